"""Serving on a Ray cluster. The only package that imports Ray; needs `pip install 'tokenmill[ray]'`.

`app.py` builds an application of Ray Serve from plain data (`plan.py`); `command.py` is `tokenmill deploy`.

    Serve's HTTP proxy ── Ingress (front.py) ── routing.py ──┬─ Replica (replica.py) ── HTTP ── tokenmill serve
                          chooses the model,     chooses the ├─ Replica …
                          sends broken requests  replica     └─ Replica …
                          to another replica

A replica is a whole server: supervisor, HTTP workers, and engine ranks of any number. One actor starts it, watches it
and relays requests to it, so Ray knows nothing of steps, tokens and tensors, and the server nothing of Ray.
"""
