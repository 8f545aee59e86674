"""Tasks that do not know their app."""

from ekiden import shared_task


@shared_task
def price(number):
    return number * 100


@shared_task(bind=True, name="shop.me")
def who(self):
    return self.name
