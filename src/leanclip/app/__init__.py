"""The local page: compare, classify and search in a browser, and a JSON API for it.

server.py   the FastAPI application with its HTML pages; the process
safety.py   the Host, the Origin and the token of every request
routes.py   the API's endpoints; schemas.py: their responses
service.py  uploads, and features and classifiers with their caches
worker.py   runs the model on batches of waiting requests
heat.py     draws an attention map over an image
templates/  HTML, rendered by Jinja2; static/: CSS and JavaScript
"""
