"""Tasks in a module that is not called ``tasks``."""

from ekiden import shared_task


@shared_task
def report():
    return "report"
