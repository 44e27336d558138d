"""`specattn bench serve`: the command line. Loads transformers where prompts are cut from text."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.bench.jobs import add_modes, device
from specattn_vllm.bench.serve import jobs, traffic
from specattn_vllm.bench.serve.prompts import Corpus, Make, random_words, write_rounds
from specattn_vllm.bench.serve.schema import WARM_UP, ServeReport, Traffic
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import models
from specattn_vllm.tools.arguments import add_engine, add_numbers, add_running, at_least, parse_list, positive

if TYPE_CHECKING:
    from specattn_vllm.tools.models import Shape

MODES = "a server each: those of `specattn bench engines`; draft is draft-v2"
ACCEPTANCE = "of --shape: tokens a round, by vLLM's synthetic acceptance"
LENGTHS = "1k:0.5,8k:0.3,32k:0.2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is served")
    what.add_argument("--target", metavar="MODEL", help=f"a folder or a name on the hub [{models.DEMO}]")
    what.add_argument("--draft", metavar="MODEL", help="likewise, for modes with a draft model")
    what.add_argument("--eagle", metavar="MODEL", help="likewise, a head of EAGLE-3's, for modes with one")
    shapes = [name for name in models.shape_names() if name != models.DEMO]
    what.add_argument("--shape", choices=shapes, help="random weights of this shape, in the place of models")
    add_modes(what, jobs.DEFAULT_MODES, MODES, None, float, ACCEPTANCE)
    add_numbers(what, ("max-num-seqs", 64, 1, "at a time"))
    add_engine(what, "or of `vllm serve`, for every mode")

    sent = parser.add_argument_group("what is asked of each server, as in `vllm bench serve`")
    told = "lengths of prompts, and the share of the requests that has each; k is 1024 [%(default)s]"
    sent.add_argument(
        "--input-len", "--lengths", type=traffic.parse_lengths, default=LENGTHS, metavar="TOKENS:SHARE,...", help=told
    )
    told = "of each answer [%(default)s]"
    sent.add_argument("--output-len", "--output-tokens", type=at_least(2), default=256, metavar="N", help=told)
    told, rate = "requests per second, a round of requests each; inf: all at once [%(default)s]", traffic.parse_rate
    sent.add_argument("--request-rate", "--rate", type=parse_list(rate), default="inf", metavar="RATE,...", help=told)
    sent.add_argument("--burstiness", type=positive, default=1.0, metavar="B", help="1 is Poisson [%(default)s]")
    told, good = "what a good request is, e.g. ttft:2000 tpot:50", parse_list(traffic.parse_goodput)
    sent.add_argument("--goodput", type=good, nargs="+", default=[], metavar="NAME:MS", help=told)
    sent.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals and prompts [%(default)s]")
    sent.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="of the prompts [Python's standard library]")
    add_numbers(
        sent,
        ("num-prompts", 100, 1, "of a round"),
        ("num-warmups", None, 1, "requests before [as many as run at a time, up to a round's]"),
        ("ready-check-timeout-sec", 1800, 1, "seconds for a server to be ready"),
    )
    add_running(parser.add_argument_group("running"), "servers", Path("specattn-bench-serve.json"), gpus=False)


def run(args: argparse.Namespace) -> int:
    if args.shape and (args.target or args.draft or args.eagle or args.text):
        raise UserError("--shape has models and prompts of its own: leave --target, --draft, --eagle and --text out")
    shape = models.load_shape(args.shape) if args.shape else None
    args.device = device(args, shape, "serve --lengths 256,512 --output-len 16 --num-prompts 8")
    goodput = [each for given in args.goodput for each in given]
    warmups = args.num_warmups or min(args.max_num_seqs, args.num_prompts)
    counts = {WARM_UP: max(warmups, len(args.input_len)), **dict.fromkeys(args.request_rate, args.num_prompts)}

    sent = {"output_tokens": args.output_len, "burstiness": args.burstiness, "seed": args.seed, "goodput": goodput}
    try:
        if args.num_prompts < len(args.input_len):
            raise ValueError(f"--num-prompts {args.num_prompts}: at least one of each length ({len(args.input_len)})")
        named = {} if shape else jobs.models_of(args)
        folders = {role: models.model_folder(role, name) for role, name in named.items()}
        planned = jobs.make_jobs(args, named, shape, Traffic(rounds=[], **sent))
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.list:
        for job in planned:
            words = shlex.join(["vllm", "serve", "{target}", *jobs.flags(job.engine_arguments)])
            print(f"{job.name}\n  {words}\n  {job.listed()}")
        return 0
    require(("vllm", "tokenizers", "pandas"))
    from specattn_vllm.bench import runner
    from specattn_vllm.bench.serve.report import markdown
    from specattn_vllm.tools.provenance import provenance

    refuse_what_is_too_long(args, shape, folders, max(job.engine_arguments["max_model_len"] for job in planned))
    runner.refuse_to_overwrite(args)  # here already: the requests beside it would be overwritten
    folder = args.out.with_suffix(".logs")
    make = prompts_of(args, shape, folders)
    settings = settings_of(args, shape, named, folders, goodput)
    if args.resume:  # before the requests of the earlier run are overwritten
        runner.earlier_engines(args.out, ServeReport(provenance={}, settings=settings, engines=[]))
    rounds, digests = write_rounds(make, args.input_len, counts, args.output_len, args.seed, folder)
    report = ServeReport(provenance=provenance(args.commit), settings=settings | {"requests": digests}, engines=[])
    wanted = jobs.make_jobs(args, named, shape, Traffic(rounds=rounds, **sent))
    return runner.carry_out(wanted, report, args, markdown)


def refuse_what_is_too_long(args: argparse.Namespace, shape: Shape | None, folders: dict[str, str], asked: int) -> None:
    """asked: positions of the servers, those that drafts in flight may take included."""
    from specattn_vllm.evaluation.models import positions_of

    most = shape.max_position if shape is not None else positions_of(folders["target"])
    if most is not None and asked > most:
        longest = max(args.input_len)
        raise UserError(
            f"--input-len {longest:,}, --output-len {args.output_len:,} and {asked - longest - args.output_len} for "
            f"drafts: there are {most:,} positions: ask for less"
        )


def prompts_of(args: argparse.Namespace, shape: Shape | None, folders: dict[str, str]) -> Make:
    from specattn_vllm.evaluation import models as evaluated
    from specattn_vllm.evaluation import texts

    if shape is not None:
        return random_words(shape.vocab_size)
    found = texts.files(args.text) if args.text else texts.held_out()
    return Corpus(evaluated.tokenizer_of(folders["target"]), [text for _, text in found])


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
    same = ("device", "output_len", "request_rate", "num_prompts", "burstiness", "seed", "max_num_seqs")
    lengths = {str(tokens): share for tokens, share in args.input_len.items()}
    return about | {name: getattr(args, name) for name in same} | {"input_len": lengths, "goodput": goodput}
