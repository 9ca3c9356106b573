"""One file's bytes, mutated as its kind is built: each function takes a random generator and gives bytes."""
