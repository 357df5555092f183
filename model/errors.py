"""Errors that a user of a checkpoint can act on."""


class CheckpointError(Exception):
    """A checkpoint folder that cannot be used; the message names the file and, where there is one, the tensor."""


class TrainingError(Exception):
    """Training settings or data that cannot work; the message names the setting."""
