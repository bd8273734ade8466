"""`python -m finetune_lens.grafting`."""

from finetune_lens.grafting import main

if __name__ == "__main__":
    main()
