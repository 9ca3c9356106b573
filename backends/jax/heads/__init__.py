"""The models of the tasks: a file exports `Model`, and the file's name is the task."""
