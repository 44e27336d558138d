#!/usr/bin/env python3
"""Does an approximate method drift? KL from full attention by position, over a long text that sparse steps decode.

    eval "$(specattn cpu-env)"
    .venv/bin/python scripts/trust/drift.py --target "$(scripts/real_model)" --text TEXTS/*/00* --out drift.json

Each setting is led through the same tokens, as `specattn eval` does it: what sparse steps write into the KV cache is
read by all later ones. The tokens are those of held-out text, or those that the sparse model wrote itself by sampling.
The reference is full attention along the same tokens. No draft model runs: the drafts are the text.

fresh    begins --window positions before the end, on a cache that full attention wrote. What it lacks, compared with
         the same positions of the long run, are the errors that sparse steps have left in the cache.
every N  reads everything in each N-th step of a request.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the forcing is inside the engine's process
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
import given
import numpy as np
import torch
from drift_hooks import dense_every, drafting
from refusal import Refused

from specattn_vllm.evaluation.engine import engine, forced_run
from specattn_vllm.evaluation.figures import estimate
from specattn_vllm.evaluation.forcing import Forcing
from specattn_vllm.evaluation.job import Job, text_tokens
from specattn_vllm.evaluation.schema import Setting
from specattn_vllm.evaluation.scores import Acceptance, Scores
from specattn_vllm.evaluation.texts import documents, files
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_json
from specattn_vllm.tools.provenance import provenance


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def job(self, name: str, options: dict, texts: list[list[int]], context: int, positions: int) -> Job:
        args = self.args
        ngram = {"method": "ngram_gpu", "num_speculative_tokens": args.draft_tokens, "prompt_lookup_max": 3}
        more: dict = {}
        if args.kv_cache_memory_bytes:  # others use the GPU too: of it, only so much must be free
            more = {"kv_cache_memory_bytes": args.kv_cache_memory_bytes, "gpu_memory_utilization": 0.05}
        if self.device == "cpu":
            more = {"num_gpu_blocks_override": len(texts) * 70 + 8}
        return Job(
            setting=Setting(name=name, options=options),
            target=str(args.target),
            draft="none",
            models={},
            draft_tokens=args.draft_tokens,
            batch=len(texts),
            device=self.device,
            dtype=args.dtype,
            engine_options={"speculative_config": ngram, **more},
            documents=texts,
            context=context,
            positions=positions,
            free_tokens=1,
        )

    def forced(self, job: Job, reference: Path) -> tuple[Scores, float]:
        """Figures by position, and the share of the KV cache that was read."""
        reference.mkdir(parents=True, exist_ok=True)
        shape = len(job.documents), job.positions
        scores, begin = Scores(*shape, reference, write=job.setting.is_reference), time.monotonic()
        forcing = Forcing(job.batch, job.max_model_len, torch.device(self.device))
        with forcing.installed(), drafting(forcing), engine(job) as llm:
            counted = forced_run(llm, job, forcing, scores, Acceptance(shape[0]))
        scores.close()
        ends = f", of the last {self.args.window} positions {scores.kl[:, -self.args.window :].mean():.5f}"
        print(f"{job.name}: KL {scores.kl.mean():.5f}{ends}, {time.monotonic() - begin:.0f} s", flush=True)
        return scores, counted.kv_fraction

    def written(self, options: dict, prompts: list[list[int]], length: int) -> list[list[int]]:
        """Prompts, and what the sparse model writes after them by sampling."""
        from vllm import SamplingParams

        args, begin = self.args, time.monotonic()
        # Without drafts: those of n-grams are hardly ever accepted here, and cost time.
        job = self.job("own text", options, prompts, args.context, args.positions)
        job.engine_options["speculative_config"] = None
        with engine(job) as llm:
            found = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [
                    SamplingParams(
                        temperature=args.temperature,
                        seed=n,
                        max_tokens=length - args.context,
                        ignore_eos=True,
                        detokenize=False,
                    )
                    for n in range(len(prompts))
                ],
                use_tqdm=False,
            )
        print(f"own text with {options}: {time.monotonic() - begin:.0f} s", flush=True)
        return [prompt + list(of.outputs[0].token_ids) for prompt, of in zip(prompts, found, strict=True)]

    def along(self, texts: list[list[int]], ratios: list[float], folder: Path, keep) -> None:
        """All settings along one set of texts; `keep` is given each one's name and figures."""
        args = self.args
        last = args.context + args.positions - args.window
        whole, fresh = folder / "whole", folder / "fresh"
        dense, _ = self.forced(self.job("dense", {"method": "dense"}, texts, args.context, args.positions), whole)
        keep("dense", {"nll": np.round(windows(dense.nll, args.window).mean(0), 5).tolist()})
        fresh.mkdir()
        for name in ("logprobs.npy", "best.npy"):
            np.save(fresh / name, np.load(whole / name, mmap_mode="r")[:, -args.window :])
        ends = [text[: text_tokens(last, args.window, args.draft_tokens)] for text in texts]
        for every in (0, *args.every):
            for ratio in ratios:
                name, options = f"ratio {ratio:g}", {"method": "sketch", "ratio": ratio}
                if every:
                    name += f", every {every}"
                with dense_every(every) if every else nullcontext():
                    of = self.forced(self.job(name, options, texts, args.context, args.positions), whole)
                keep(name, figures(*of, args.window))
                if not every:
                    name += ", fresh"
                    of = self.forced(self.job(name, options, ends, last, args.window), fresh)
                    keep(name, figures(*of, args.window))
        shutil.rmtree(folder)


def windows(values: np.ndarray, window: int) -> np.ndarray:
    return values.reshape(len(values), -1, window).mean(-1)


def figures(scores: Scores, read: float, window: int) -> dict:
    """Means of windows, by document and over all, and the slope of the KL with its interval over documents."""
    kl, agrees, nll = (windows(of, window) for of in (scores.kl, scores.agrees, scores.nll))
    found = {"kl": kl.mean(0), "top1": agrees.mean(0), "nll": nll.mean(0), "kl_by_document": kl}
    found = {"kv_read": round(read, 4), **{name: np.round(of, 5).tolist() for name, of in found.items()}}
    found["kl_mean"] = _with_interval(kl.mean(1))
    if kl.shape[1] > 2:
        # Of each document the line through its windows; nats for 1,000 positions.
        slopes = np.polyfit((np.arange(kl.shape[1]) + 0.5) * window / 1000, kl.T, 1)[0]
        found["kl_slope_per_1000"] = _with_interval(slopes)
    return found


def _with_interval(values: np.ndarray) -> dict:
    of = estimate(lambda counts: counts @ values / counts.sum(1), len(values))
    return {"value": round(of.value, 6), "interval": of.interval and [round(end, 6) for end in of.interval]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    given.add_model_and_texts(parser)
    add("--context", type=int, default=2500, metavar="N", help="tokens of the prompts [%(default)s]")
    add("--positions", type=int, default=4096, metavar="N", help="decoded after it [%(default)s]")
    add("--window", type=int, default=256, metavar="N", help="positions of a mean [%(default)s]")
    add("--ratios", type=float, nargs="*", default=[0.125, 0.08], metavar="R", help="along the text [0.125 0.08]")
    add("--own", type=float, nargs="*", default=[0.08], metavar="R", help="ratios that write a text themselves [0.08]")
    add(
        "--every",
        type=int,
        nargs="*",
        default=[16, 64],
        metavar="N",
        help="also with full attention in each N-th step [16 64]",
    )
    add("--draft-tokens", type=int, default=4, metavar="K", help="of the text, in a round [%(default)s]")
    add("--temperature", type=float, default=1.0, metavar="T", help="of the own text [%(default)g]")
    add("--dtype", default="float32", help="of weights and KV cache [%(default)s]")
    add("--kv-cache-memory-bytes", type=int, metavar="N", help="on a GPU that others use too [most of its memory]")
    add("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    if args.positions % args.window:
        parser.error(f"--positions {args.positions} are no whole windows of {args.window}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.target, local_files_only=True)
    length = text_tokens(args.context, args.positions, args.draft_tokens)
    if length > (there := given.positions(args.target)):
        raise Refused(f"{length} positions for --context and --positions, and the model has {there}: lower one")
    try:
        read = list(files(args.text))
    except UserError as error:
        raise Refused(str(error)) from None
    try:
        found = documents(iter(read), lambda text: tokenizer(text, verbose=False).input_ids, length, len(read))
    except UserError:  # which names arguments that are not ours
        raise Refused(f"a text has fewer than {length} tokens: leave it out, or lower --context") from None
    study, texts = Study(args), [document.ids for document in found]
    report = provenance() | {"command": shlex.join(["scripts/trust/drift.py", *sys.argv[1:]])}
    report["settings"] = {n: getattr(args, n) for n in ("context", "positions", "window", "draft_tokens", "dtype")}
    report["settings"] |= {"temperature": args.temperature, "model": args.target.name}
    report["documents"] = [{"name": of.name, "sha256": of.digest} for of in found]
    folder = args.out.with_suffix(".reference")
    shutil.rmtree(folder, ignore_errors=True)

    def keep(along: str):
        def kept(name: str, of: dict) -> None:
            report.setdefault(along, {})[name] = of
            write_json(args.out, report)

        return kept

    if args.ratios:
        study.along(texts, args.ratios, folder, keep("along held-out text"))
    for ratio in args.own:
        own = study.written({"method": "sketch", "ratio": ratio}, [text[: args.context] for text in texts], length)
        study.along(own, [ratio], folder, keep(f"along its own text, ratio {ratio:g}"))


if __name__ == "__main__":
    main()
