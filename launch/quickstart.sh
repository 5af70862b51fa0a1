#!/usr/bin/env bash
# From nothing to an evaluated and exported mixture of experts, on 2 CPU cores in about ten minutes.
# The text is what every Python has: the source of its standard library.
set -euo pipefail
EXTRAS=hf,report
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

out=runs/quickstart
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - began)); }
train() { torchrun --standalone --nproc-per-node 2 -m moetrain train "$@" --train.dtype "$dtype"; }
# bfloat16 where this processor multiplies it faster than float32.
dtype=$(python launch/quickstart.py dtype)

if [ ! -e $out/data/stdlib_valid.json ]; then
    say "prepare: the standard library as bytes"
    moetrain prepare --prepare.inputs "['$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')']" \
        --prepare.output $out/data/stdlib --prepare.extensions "['.py']" --prepare.validation_fraction 0.03 --prepare.workers 2 \
        --prepare.exclude "['site-packages', 'dist-packages', 'test', '*/test', '*/tests', 'config-*']"
fi

say "train the dense model, two processes, $dtype"
train --config configs/quickstart/dense.yaml

if [ ! -e $out/dense_hf ]; then
    say "export it to Hugging Face"
    moetrain export --run_dir $out/dense --export.output $out/dense_hf
fi
if [ ! -e $out/dsmoe ]; then
    say "cut it into 8 experts per layer"
    moetrain upcycle --upcycle.dense $out/dense_hf --upcycle.output $out/dsmoe --upcycle.num_experts 8 --upcycle.method dsmoe
fi

say "train the DSMoE, two expert-parallel processes, $dtype"
train --config configs/quickstart/moe.yaml

say "evaluate both on the same held-out text"
moetrain eval --run_dir $out/dense --eval.output $out/dense.json
moetrain eval --run_dir $out/moe --eval.output $out/moe.json

if [ ! -e $out/moe_hf ]; then
    say "export the DSMoE to Hugging Face"
    moetrain export --run_dir $out/moe --export.output $out/moe_hf
fi

say "a sample from the export, by transformers"
python launch/quickstart.py sample $out/moe_hf "def __init__(self, "

say "result"
python launch/quickstart.py table $out
