"""Verifies deliveries with Standard Webhooks' own library.

Standard input: one JSON object a line with `secret`, `headers` and `body`. Ends with 1 at the first that does not verify.
"""

import json
import sys

from standardwebhooks.webhooks import Webhook

count = 0
for line in sys.stdin:
    delivery = json.loads(line)
    payload = Webhook(delivery["secret"]).verify(delivery["body"], delivery["headers"])
    assert payload["event"], payload
    count += 1
print(f"{count} verified")
