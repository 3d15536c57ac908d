"""What schemathesis cannot know of the service's API."""

import re
import uuid

import schemathesis

KEY = "Idempotency-Key"


@schemathesis.hook
def before_call(context, case, kwargs):
    """A key belongs to one request for ever, and is refused with any other: each request has its own."""
    headers = case.headers
    if headers and re.fullmatch("[!-~]{1,255}", headers.get(KEY, "")):
        headers[KEY] = (headers[KEY] + uuid.uuid4().hex)[-255:]
