"""Settings in a module."""

broker_url = "memory://configured"
result_backend = "memory://configured"
task_default_queue = "letters"
task_acks_late = True
worker_max_tasks_per_child = 100
imports = ("tests.porting.programs.shop.tasks",)
