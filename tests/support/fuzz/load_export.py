"""Loads an exported folder as its user would, with transformers alone and no code from the folder."""

import sys


def main() -> None:
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
    except Exception as error:  # what transformers says about a damaged folder is not ours
        print(f"Error: {type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
