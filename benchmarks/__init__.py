"""How fast, how large, how exact: this package beside others that compute the same, on the CPU.

    mamba-core bench --out benchmarks/results/bench.json      measures, and writes what it found, with the machine
    python -m mamba_core.benchmarks.report                    makes the README's tables and plots from results/*.json
    python -m mamba_core.benchmarks.digests --base COMMIT     whether all results have the same bits as another commit's
    python -m mamba_core.benchmarks.positions --base COMMIT   what padding and packing cost, beside another commit

`cases` says what is timed, `ours`, `peers` and `floors` who takes part, `runner` how it is timed.
"""
