"""Settings as a Django project has them: capitals, behind a prefix, among others."""

SECRET_KEY = "something else"
CELERY_BROKER_URL = "memory://django"
CELERY_TASK_DEFAULT_QUEUE = "web"
CELERY_TASK_IGNORE_RESULT = True
