"""Where Celery's users look for ``crontab``: each name that it has says what to do meanwhile."""


def __getattr__(name: str) -> object:
    from ekiden.celery_names import missing_name  # only for a name that is not here

    raise missing_name(__name__, name)
