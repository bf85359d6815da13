"""What is not homework: stand-in data, executing the notebook, the model of the clone.

Each tool runs from the repository's root as a module, as in `python -m tools.make_sample_data -h`.
"""
