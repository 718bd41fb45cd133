"""Generate text with an exported model, through transformers alone.

python tools/generate.py DIRECTORY --prompt TEXT [--tokens N] [--temperature T] [--seed S]
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a Hugging Face directory with a tokenizer")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=100, help="new tokens at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for greedy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.directory / "config.json").is_file():
        print(f"error: {arguments.directory} has no config.json: give a directory made by tools/convert_checkpoint.py", file=sys.stderr)
        return 2

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(arguments.seed)
    # The modelling file comes from the directory itself; give only directories that you trust.
    tokenizer = AutoTokenizer.from_pretrained(arguments.directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.directory, trust_remote_code=True).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").input_ids.to(model.device)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": 0.95} if arguments.temperature > 0 else {}
    tokens = model.generate(prompt, max_new_tokens=arguments.tokens, **sampling)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
