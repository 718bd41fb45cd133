"""An exported model loaded by plain transformers, without this project: python examples/load_export.py DIRECTORY

DIRECTORY is what `nha-megatron export` or examples/train.py wrote. Its modelling file is executed: give only directories that you trust.
"""

import sys

import torch
from transformers import AutoModelForCausalLM


def main(directory: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    print(f"{model.num_parameters():,} parameters, logits {tuple(logits.shape)}")
    print(f"{prompt[0].tolist()} goes on with {tokens[0, prompt.shape[1] :].tolist()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/load_export.py DIRECTORY")
    main(sys.argv[1])
