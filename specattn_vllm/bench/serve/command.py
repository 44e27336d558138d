"""`specattn bench serve`: the command line. Loads transformers where prompts are cut from text."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.bench.jobs import ACCEPTANCE_LENGTH, DRAFT_TOKENS, parse_for_mode, parse_list
from specattn_vllm.bench.serve import jobs, traffic
from specattn_vllm.bench.serve.prompts import Corpus, Make, random_words, write_rounds
from specattn_vllm.bench.serve.schema import WARM_UP, Round, ServeReport, Traffic
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import models
from specattn_vllm.tools.arguments import (
    add_commit,
    add_engine_argument,
    add_running,
    at_least,
    parse_option,
    positive,
    share,
)

if TYPE_CHECKING:
    from specattn_vllm.tools.models import Shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is served")
    what.add_argument("--target", metavar="MODEL", help=f"a folder or a name on the hub [{models.DEMO}]")
    what.add_argument("--draft", metavar="MODEL", help="likewise, for modes with a draft model")
    what.add_argument("--eagle", metavar="MODEL", help="likewise, a head of EAGLE-3's, for modes with one")
    shapes = [name for name in models.shape_names() if name != models.DEMO]
    what.add_argument("--shape", choices=shapes, help="random weights of this shape, in the place of models")
    what.add_argument(
        "--modes",
        type=parse_list(jobs.parse_serve_mode),
        default=",".join(jobs.DEFAULT_MODES),
        metavar="MODE,...",
        help="a server each: those of `specattn bench engines`; draft is draft-v2 [%(default)s]",
    )
    what.add_argument("--kept", type=parse_list(share), metavar="SHARE,...", help="a server each [the method's own]")
    what.add_argument(
        "--draft-tokens",
        type=parse_for_mode(at_least(1)),
        action="append",
        default=[],
        metavar="[MODE:]K",
        help=f"drafted a round; may be repeated [{DRAFT_TOKENS}]",
    )
    what.add_argument(
        "--acceptance-length",
        type=parse_for_mode(float),
        action="append",
        default=[],
        metavar="[MODE:]A",
        help=f"of --shape: tokens a round, by vLLM's synthetic acceptance; may be repeated [{ACCEPTANCE_LENGTH:g}]",
    )
    what.add_argument(
        "--option", type=parse_option, action="append", default=[], metavar="[MODE:]KEY=VALUE", help="of the plugin"
    )
    what.add_argument("--max-num-seqs", type=at_least(1), default=64, metavar="N", help="at a time [%(default)s]")
    what.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="[%(default)s]")
    add_engine_argument(what, "or of `vllm serve`, for every mode")

    sent = parser.add_argument_group("what is asked of each server, as in `vllm bench serve`")
    sent.add_argument(
        "--input-len",
        "--lengths",
        type=traffic.parse_lengths,
        default="1k:0.5,8k:0.3,32k:0.2",
        metavar="TOKENS:SHARE,...",
        help="lengths of prompts, and the share of the requests that has each; k is 1024 [%(default)s]",
    )
    told = "of each answer [%(default)s]"
    sent.add_argument("--output-len", "--output-tokens", type=at_least(2), default=256, metavar="N", help=told)
    sent.add_argument(
        "--request-rate",
        "--rate",
        type=parse_list(traffic.parse_rate),
        default="inf",
        metavar="RATE,...",
        help="requests per second, a round of requests each; inf: all at once [%(default)s]",
    )
    sent.add_argument("--num-prompts", type=at_least(1), default=100, metavar="N", help="of a round [%(default)s]")
    sent.add_argument(
        "--num-warmups",
        type=at_least(1),
        metavar="N",
        help="requests before [as many as run at a time, up to a round's]",
    )
    sent.add_argument("--burstiness", type=positive, default=1.0, metavar="B", help="1 is Poisson [%(default)s]")
    sent.add_argument(
        "--goodput",
        type=parse_list(traffic.parse_goodput),
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="what a good request is, e.g. ttft:2000 tpot:50",
    )
    sent.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals and prompts [%(default)s]")
    sent.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="of the prompts [Python's standard library]")
    told = "for a server to be ready [%(default)s]"
    sent.add_argument("--ready-check-timeout-sec", type=at_least(1), default=1800, metavar="S", help=told)

    running = parser.add_argument_group("running")
    add_running(running, "servers", Path("specattn-bench-serve.json"))
    add_commit(running)


def run(args: argparse.Namespace) -> int:
    from specattn_vllm.tools.provenance import has_gpu, provenance

    if args.shape and (args.target or args.draft or args.eagle or args.text):
        raise UserError("--shape has models and prompts of its own: leave --target, --draft, --eagle and --text out")
    shape = models.load_shape(args.shape) if args.shape else None
    if args.device == "auto":
        args.device = "cuda" if (args.list and shape is not None) or has_gpu() else "cpu"
        if args.device == "cpu" and shape is not None:
            raise UserError(
                "no NVIDIA GPU was found: try `specattn bench serve --lengths 256,512 --output-len 16 --num-prompts 8` "
                f"or insist on {args.shape} with --device cpu (--shape tiny is for that)"
            )
    goodput = [each for given in args.goodput for each in given]
    warmups = args.num_warmups or min(args.max_num_seqs, args.num_prompts)
    counts = {WARM_UP: max(warmups, len(args.input_len)), **dict.fromkeys(args.request_rate, args.num_prompts)}

    def asked(rounds: list[Round]) -> Traffic:
        return Traffic(
            rounds=rounds, output_tokens=args.output_len, burstiness=args.burstiness, seed=args.seed, goodput=goodput
        )

    try:
        if args.num_prompts < len(args.input_len):
            raise ValueError(f"--num-prompts {args.num_prompts}: at least one of each length ({len(args.input_len)})")
        named = {} if shape else jobs.models_of(args)
        folders = {role: models.model_folder(role, name) for role, name in named.items()}
        planned = jobs.make_jobs(args, named, shape, asked([]))
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.list:
        for job in planned:
            words = shlex.join(["vllm", "serve", "{target}", *jobs.flags(job.engine_arguments)])
            print(f"{job.name}\n  {words}\n  environment: {' '.join(f'{k}={v!r}' for k, v in job.environment.items())}")
        return 0
    require(("vllm", "tokenizers", "pandas"))
    from specattn_vllm.bench import runner as runners
    from specattn_vllm.bench.serve import report as reports
    from specattn_vllm.bench.serve import runner

    refuse_what_is_too_long(args, shape, folders, max(job.engine_arguments["max_model_len"] for job in planned))
    runners.refuse_to_overwrite(args)  # here already: the requests beside it would be overwritten
    folder = args.out.with_suffix(".logs")
    make = random_words(shape.vocab_size) if shape is not None else corpus(args.text, folders["target"])
    settings = settings_of(args, shape, named, folders, goodput)
    if args.resume:  # before the requests of the earlier run are overwritten
        runners.earlier_engines(args.out, ServeReport(provenance={}, settings=settings, engines=[]))
    rounds, digests = write_rounds(make, args.input_len, counts, args.output_len, args.seed, folder)
    report = ServeReport(provenance=provenance(args.commit), settings=settings | {"requests": digests}, engines=[])
    wanted = jobs.make_jobs(args, named, shape, asked(rounds))
    return runners.carry_out(
        wanted, report, args, reports.markdown, what="server", run=runner.run_job, told=runner.outcome
    )


def corpus(files: list[Path] | None, target: str) -> Make:
    from specattn_vllm.evaluation import models as evaluated
    from specattn_vllm.evaluation import texts

    found = texts.files(files) if files else texts.held_out()
    return Corpus(evaluated.tokenizer_of(target), [text for _, text in found])


def refuse_what_is_too_long(args: argparse.Namespace, shape: Shape | None, folders: dict[str, str], asked: int) -> None:
    """asked: positions of the servers, those that drafts in flight may take included."""
    from specattn_vllm.evaluation.models import positions_of

    most = shape.max_position if shape is not None else positions_of(folders["target"])
    longest = max(args.input_len)
    if most is not None and asked > most:
        drafts = asked - longest - args.output_len
        raise UserError(
            f"--input-len {longest:,}, --output-len {args.output_len:,} and {drafts} for drafts: there are {most:,} "
            "positions: ask for less"
        )


def settings_of(
    args: argparse.Namespace, shape: Shape | None, named: dict[str, str], folders: dict[str, str], goodput: list[str]
) -> dict[str, Any]:
    """What all servers of one report have in common."""
    from specattn_vllm.evaluation.models import identity

    if shape is not None:
        about = {"shape": shape.name, "description": shape.description}
    else:
        found = identity("target", named["target"], folders["target"])  # drafters are a server's own
        about = {"target": found, "description": found["name"]}
    return about | {
        "device": args.device,
        "input_len": {str(tokens): share for tokens, share in args.input_len.items()},
        "output_len": args.output_len,
        "request_rate": args.request_rate,
        "num_prompts": args.num_prompts,
        "burstiness": args.burstiness,
        "goodput": goodput,
        "seed": args.seed,
        "max_num_seqs": args.max_num_seqs,
    }
