"""`python -m arrow_quant_v2` and the `arrow-quant` command; nothing else."""

from arrow_quant_v2.cli import main

if __name__ == "__main__":
    main()
