"""What `import jaxdistill` offers to a Python program; docs/python.md shows it.

Everything here is a short way to what the commands do: a run is run/loop.py, a measurement jobs/measure.py.
"""
