"""The local page: compare, classify and search in a browser, and a JSON API for it.

server.py   the socket and the process; the FastAPI application and its HTML pages
safety.py   checks every request first: Host, Origin, token, size; adds headers to responses
routes.py   the API's endpoints; schemas.py: their responses
service.py  uploads, and features and classifiers with their caches
worker.py   runs the model on batches of waiting requests
heat.py     draws an attention map over an image
templates/  HTML, rendered by Jinja2; static/: CSS and JavaScript, served as they are
"""
