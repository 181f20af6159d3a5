"""`python -m dylora_moe` is the `dylora-moe` command."""

from .cli import main


if __name__ == "__main__":
    main()
