"""Run `python -m bench.gpu`: a measurement of this engine, with --parts a plan, with --checkpoint a checkpoint."""

import sys

if __name__ == "__main__":
    given = {word.split("=")[0] for word in sys.argv[1:]}
    if given & {"--parts", "--table"}:
        from bench.gpu.plan import main
    elif "--checkpoint" in given:
        from bench.gpu.checkpoint import main
    else:
        from bench.gpu.offline import main
    main()
