"""Peer: Flask on waitress with 64 threads. python peer_flask.py PORT DATABASE"""
# pylint: disable=import-error # Flask and waitress are in compare.py's environment for the peers
import logging

from contract import API_KEY, Jobs, port_and_database
from flask import Flask, Response, json, request
from waitress import serve

PORT, DATABASE = port_and_database()
JOBS = Jobs(DATABASE)
app = Flask(__name__)
logging.getLogger("waitress").setLevel(logging.ERROR)


def answer(status, value):
    """Answer with a value as JSON."""
    return Response(json.dumps(value), status, mimetype="application/json")


@app.before_request
def authorise():
    """Let a request with the key through; answer 401 to any other.

    waitress drops header names with an underscore, so the load sends api-key too; WSGI calls both
    HTTP_API_KEY.
    """
    if request.environ.get("HTTP_API_KEY") != API_KEY:
        return answer(401, {"error": "api_key"})
    return None


@app.post("/jobs/add/")
def add():
    """POST /jobs/add/"""
    return answer(*JOBS.add(request.get_data()))


@app.get("/jobs/list/")
def listing():
    """GET /jobs/list/"""
    return answer(*JOBS.list())


@app.get("/jobs/<int:number>/")
def get(number):
    """GET /jobs/{id}/"""
    return answer(*JOBS.get(number))


serve(app, host="127.0.0.1", port=PORT, threads=64)
