"""`python -m finetune_lens.revival`."""

from finetune_lens.revival import main

if __name__ == "__main__":
    main()
