"""Peer: aiohttp, SQLite in its thread pool. python peer_aiohttp.py PORT DATABASE"""
import asyncio

from aiohttp import web     # pylint: disable=import-error # in compare.py's environment for the peers
from contract import API_KEY, Jobs, port_and_database

PORT, DATABASE = port_and_database()
JOBS = Jobs(DATABASE)


@web.middleware
async def authorise(request, handler):
    """Let a request with the key through; answer 401 to any other."""
    if request.headers.get("api_key") != API_KEY:
        return web.json_response({"error": "api_key"}, status=401)
    return await handler(request)


async def answer(function, *arguments):
    """Answer with what a function of the store gives, called in a thread of the pool."""
    loop = asyncio.get_running_loop()
    status, value = await loop.run_in_executor(None, function, *arguments)
    return web.json_response(value, status=status)


async def add(request):
    """POST /jobs/add/"""
    return await answer(JOBS.add, await request.read())


async def listing(_):
    """GET /jobs/list/"""
    return await answer(JOBS.list)


async def get(request):
    """GET /jobs/{id}/"""
    return await answer(JOBS.get, int(request.match_info["number"]))


app = web.Application(middlewares=[authorise])
app.router.add_post("/jobs/add/", add)
app.router.add_get("/jobs/list/", listing)
app.router.add_get(r"/jobs/{number:\d+}/", get)
web.run_app(app, host="127.0.0.1", port=PORT, print=None, access_log=None)
