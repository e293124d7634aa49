"""An HTTP server for one model: a page to try it in, and an API for programs and label tools.

`create_app` in `app.py` has the routes, `engine.py` the thread that owns the device, `store.py` the
encoded images, and `security.py` the checks of every request.
"""
