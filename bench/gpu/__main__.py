"""`python -m bench.gpu`: one measurement of this engine; with --parts a plan of many and one table."""

import sys

if __name__ == "__main__":
    if any(word.split("=")[0] in ("--parts", "--table") for word in sys.argv[1:]):
        from bench.gpu.plan import main
    else:
        from bench.gpu.offline import main
    main()
