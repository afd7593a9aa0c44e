"""`python -m gnbench` is `gnbench`."""

from gnbench.cli import main

if __name__ == "__main__":
    main()
