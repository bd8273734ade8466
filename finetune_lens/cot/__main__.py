"""`python -m finetune_lens.cot`."""

from finetune_lens.cot import main

if __name__ == "__main__":
    main()
