#!/usr/bin/env python3
"""Make a layer map of the demo pair: which draft layer's attention stands in for which target layer's.

    python3 scripts/calibrate_demo_map.py --target DIR/target --draft DIR/draft --out configs/demo.json
    python3 scripts/calibrate_demo_map.py ... --method sts --out configs/demo-sts.json       # and which head for which

Reads training-side text only: installed packages (or --corpus), filtered as the training script filters them, never
the standard library that the evaluation reads. The same seed on the same text gives the same map.
"""

import argparse
import datetime
import hashlib
import json
import platform
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from specattn_vllm.calibration import (
    EPSILON,
    HEAD_SIMILARITIES,
    HeadSimilarity,
    Similarity,
    head_map,
    monotone_map,
)

# Python puts a script's folder on the path itself, but not under `python -P` or PYTHONSAFEPATH=1.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_corpus import collect_corpus, site_dirs

ROWS = "specattn_rows"


class RowCapture:
    """An attention function for transformers that keeps the attention of chosen queries, layer by layer, averaged over
    the query heads of each KV head.

    The full matrix of a 4096-token window takes 64 MB a head; the chosen rows of all heads take one.
    """

    def __init__(self):
        self.queries = torch.empty(0, dtype=torch.long)
        self.rows: list[torch.Tensor] = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        """query: [1, heads, tokens, size], key and value: [1, KV heads, tokens, size], all after RoPE."""
        wide = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query[0, :, self.queries].float() @ wide[0].float().transpose(1, 2) * scaling
        behind = torch.arange(key.shape[2]) > self.queries[:, None]
        attention = scores.masked_fill(behind, float("-inf")).softmax(-1)
        self.rows.append(attention.unflatten(0, (key.shape[1], -1)).mean(1))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    def run(self, model, ids, queries):
        """Attention of `queries` in the window `ids` [tokens]: [layers, KV heads, queries, tokens]."""
        self.queries, self.rows = queries, []
        model.model(input_ids=ids[None], use_cache=False)  # without the head: logits are not needed
        return torch.stack(self.rows)


def windows(documents, tokenizer, count, size, seed):
    """`count` windows of `size` token ids, each from another package directory while there are enough."""
    rng = random.Random(seed)
    found, passes = [], 0
    while len(found) < count:
        before, passes = len(found), passes + 1
        for document in rng.sample(documents, len(documents)):
            text = ""
            for part in document[rng.randrange(len(document)) :]:
                text += part
                if len(text) > 12 * size:  # far more characters than a window of tokens needs
                    break
            ids = tokenizer(text[: 12 * size])["input_ids"] if len(text) > size else []
            if len(ids) >= size:
                found.append(ids[:size])
                if len(found) == count:
                    break
        if len(found) == before and passes > 20:
            raise SystemExit(f"no package directory of the corpus holds {size} tokens")
    return torch.tensor(found)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", type=Path, required=True)
    add("--draft", type=Path, required=True)
    add("--corpus", type=Path, nargs="+", help="directories whose children are packages (default: site-packages)")
    add("--out", type=Path, required=True)
    add("--tokens", type=int, default=131072)
    add("--window", type=int, default=4096)
    add("--queries", type=int, default=64, help="query positions sampled in each window")
    add("--dense-layers", type=int, default=1, help="first target layers that read everything")
    add("--seed", type=int, default=0)
    add("--method", choices=("specattn", "sts"), default="specattn", help="what the map is for; sts: with a head map")
    add("--head-similarity", choices=HEAD_SIMILARITIES, default="overlap", help="how heads are compared (sts)")
    add("--ranks", type=int, default=1, help="map heads within each of so many tensor-parallel ranks only (sts)")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv=None):
    from specattn_vllm.fingerprint import fingerprint

    args = parse_args(argv)
    AttentionInterface.register(ROWS, capture := RowCapture())
    # fp32: on a CPU it is faster than bf16 and leaves the weights as they are.
    target, draft = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32, attn_implementation=ROWS).eval()
                     for p in (args.target, args.draft))
    if not 0 <= args.dense_layers < target.config.num_hidden_layers:
        raise SystemExit(f"--dense-layers: 0 to {target.config.num_hidden_layers - 1}")
    if not 0 < args.queries <= args.window - args.window // 16:
        raise SystemExit("--queries: more than a window holds")
    if args.method != "sts" and (args.head_similarity != "overlap" or args.ranks != 1):
        raise SystemExit("--head-similarity and --ranks are for --method sts")
    if any(model.config.num_key_value_heads % args.ranks for model in (target, draft)):
        raise SystemExit(f"--ranks: {args.ranks} ranks do not divide the KV heads of target and draft")
    tokenizer = AutoTokenizer.from_pretrained(args.target, local_files_only=True)
    documents, _, _ = collect_corpus(args.corpus or site_dirs(), args.seed)
    ids = windows(documents, tokenizer, -(-args.tokens // args.window), args.window, args.seed)

    similarity = Similarity(target.config.num_hidden_layers, draft.config.num_hidden_layers)
    between_heads = HeadSimilarity(args.head_similarity) if args.method == "sts" else None
    generator = torch.Generator().manual_seed(args.seed)
    first = args.window // 16  # a query with a handful of keys says little about which keys a layer chooses
    for window in tqdm(ids, desc="windows"):
        queries = (first + torch.randperm(args.window - first, generator=generator)[: args.queries]).sort().values
        ours, theirs = capture.run(target, window, queries), capture.run(draft, window, queries)
        similarity.add(ours.mean(1), theirs.mean(1), queries + 1)
        if between_heads is not None:
            between_heads.add(ours, theirs, queries + 1)

    mean = similarity.mean()
    layers = [None] * args.dense_layers + monotone_map(mean[args.dense_layers :])
    heads, found = None, {}
    if between_heads is not None:
        of_mapped = [None if i is None else between_heads.mean()[j, i] for j, i in enumerate(layers)]
        heads = [None if pair is None else head_map(pair, args.ranks) for pair in of_mapped]
        values = [None if pair is None else [[round(v, 4) for v in row] for row in pair.tolist()] for pair in of_mapped]
        found = {"heads": {"similarity": args.head_similarity, "ranks": args.ranks, "values": values}}
    # Names, not paths: where the folders lay when the map was made tells a reader nothing.
    command = (f"scripts/calibrate_demo_map.py --target {args.target.name} --draft {args.draft.name} "
               f"--out {args.out.name} --tokens {args.tokens} --window {args.window} --queries {args.queries} "
               f"--dense-layers {args.dense_layers} --seed {args.seed}")
    if args.method == "sts":
        command += f" --method sts --head-similarity {args.head_similarity} --ranks {args.ranks}"
    layer_map = {
        "schema": "specattn-layer-map/1", "method": args.method, "calibrated": True,
        "target": fingerprint(args.target), "draft": fingerprint(args.draft), "layers": layers, "heads": heads,
        "provenance": {
            "similarity": [[round(value, 4) for value in row] for row in mean.tolist()], **found,
            "tokens": ids.numel(), "windows": len(ids), "seed": args.seed, "epsilon": EPSILON,
            "text_sha256": hashlib.sha256("\n".join(tokenizer.batch_decode(ids.tolist())).encode()).hexdigest(),
            "created": datetime.datetime.now(datetime.UTC).date().isoformat(), "command": command,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__}}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(layer_map, indent=1) + "\n")
    print(f"{args.out}: layers {layers}, heads {heads}, from {ids.numel()} tokens, {similarity.queries} queries")


if __name__ == "__main__":
    main()
