"""A campaign of faults, run by hand: mutated inputs for every reader, and kills of what writes.

python -m tests.campaign fuzz --cases 1000000 --seed 0 --jobs 2
python -m tests.campaign kills --random 200 --injected 60 --seed 0
"""
