"""How a workflow ends without a result and without a failure."""


class RunComplete(Exception):
    """The resumed run is already complete: its folder contains the model and the results."""
