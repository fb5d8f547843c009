"""How a workflow ends without a result and without a failure."""


class RunComplete(Exception):
    """A run that was resumed has ended already: its folder holds the model and the results."""
