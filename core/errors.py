class UserError(ValueError):
    """A mistake of the person at the keyboard: launchers print its one line, which names the culprit, and exit."""
