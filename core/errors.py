class UserError(ValueError):
    """A mistake of the person at the keyboard: launchers print its one line, which names the culprit, and exit."""


def check_choices(config, **known):
    """Of every named key of `config`, that it is one of those known."""
    for name, choices in known.items():
        if config[name] not in choices:
            raise UserError(f'{name} = "{config[name]}" is none of {", ".join(choices)}')
