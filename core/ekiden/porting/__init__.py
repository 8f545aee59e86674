"""``ekiden port``: reads a project that uses Celery, without running it, and says what becomes of each line.

names      what Celery's modules and names are here
reading    a project's files -> findings, by file and line
rewriting  the imports and commands that can be rewritten by a machine
"""
