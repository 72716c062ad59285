"""Peer: FastAPI on uvicorn with uvloop and httptools. python peer_fastapi.py PORT DATABASE"""
# pylint: disable=import-error # FastAPI and uvicorn are in compare.py's environment for the peers
import uvicorn
from contract import API_KEY, Jobs, port_and_database
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

PORT, DATABASE = port_and_database()
JOBS = Jobs(DATABASE)
app = FastAPI()


def allowed(request):
    """Return whether a request has the key."""
    return request.headers.get("api_key") == API_KEY


@app.post("/jobs/add/")
async def add(request: Request):
    """POST /jobs/add/"""
    if not allowed(request):
        return JSONResponse({"error": "api_key"}, 401)
    status, value = await run_in_threadpool(JOBS.add, await request.body())
    return JSONResponse(value, status)


@app.get("/jobs/list/")
def listing(request: Request):
    """GET /jobs/list/"""
    if not allowed(request):
        return JSONResponse({"error": "api_key"}, 401)
    status, value = JOBS.list()
    return JSONResponse(value, status)


@app.get("/jobs/{number}/")
def get(number: int, request: Request):
    """GET /jobs/{id}/"""
    if not allowed(request):
        return JSONResponse({"error": "api_key"}, 401)
    status, value = JOBS.get(number)
    return JSONResponse(value, status)


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="error", access_log=False)
