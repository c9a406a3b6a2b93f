"""Redis as people run it: TLS, users, replicas, Sentinel, Cluster. Whatever it does, no caller sees an error."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis
from prometheus_client import REGISTRY

from baton.internal.v1 import response_cache_pb2
from baton.rpc.service import CannotStart
from tests.cache.conftest import Cache, an_answer, cache_key, eventually, name_of, running_cache
from tests.cache.redis_lab import FREEZE, Certificates, Server, a_cluster, documented_rights, join, running, speaks_tls

FAILED = response_cache_pb2.MISS_REASON_STORE_FAILED
QUICK = {"redis_timeout": 0.3, "breaker_seconds": 0.2}


async def works(cache: Cache) -> bool:
    """Whether an answer can be stored and found."""
    return await cache.fill(cache_key(), an_answer()) and (await cache.lookup(cache_key())).hit


# TLS


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    if not speaks_tls():
        pytest.skip("the redis-server here was built without TLS, or there is no openssl")
    return Certificates.make(tmp_path / "certificates")


async def test_tls(tmp_path: Path, certificates: Certificates) -> None:
    server = Server(tmp_path / "redis", "tls-auth-clients no", tls=certificates)
    with running(server):
        url = f"rediss://127.0.0.1:{server.port}/0"
        async with running_cache(url, redis_ca_file=certificates.ca) as cache:
            assert await works(cache)
        async with running_cache(url, **QUICK) as cache:
            assert await cache.miss(cache_key()) == FAILED, "the system's certificates do not know this one"
        by_name = url.replace("127.0.0.1", "localhost")
        async with running_cache(by_name, redis_ca_file=certificates.ca, **QUICK) as cache:
            assert await cache.miss(cache_key()) == FAILED, "the certificate is not for this name"
        async with running_cache(by_name, redis_ca_file=certificates.ca, redis_check_hostname=False) as cache:
            assert await works(cache)


async def test_tls_with_the_wrong_ca(tmp_path: Path, certificates: Certificates) -> None:
    other = Certificates.make(tmp_path / "others")
    server = Server(tmp_path / "redis", "tls-auth-clients no", tls=certificates)
    with running(server):
        async with running_cache(f"rediss://127.0.0.1:{server.port}", redis_ca_file=other.ca, **QUICK) as cache:
            assert not await cache.fill(cache_key(), an_answer())
            assert await cache.miss(cache_key()) == FAILED


async def test_tls_both_ways(tmp_path: Path, certificates: Certificates) -> None:
    server = Server(tmp_path / "redis", "tls-auth-clients yes", tls=certificates)
    with running(server):
        url = f"rediss://127.0.0.1:{server.port}"
        ours = {"redis_cert_file": certificates.cert, "redis_key_file": certificates.key}
        async with running_cache(url, redis_ca_file=certificates.ca, **ours) as cache:
            assert await works(cache)
        async with running_cache(url, redis_ca_file=certificates.ca, **QUICK) as cache:
            assert not await works(cache)


async def test_a_tls_server_that_is_spoken_to_in_plain(tmp_path: Path, certificates: Certificates) -> None:
    server = Server(tmp_path / "redis", "tls-auth-clients no", tls=certificates)
    with running(server):
        async with running_cache(f"redis://127.0.0.1:{server.port}", **QUICK) as cache:
            assert await cache.miss(cache_key()) == FAILED


async def test_unusable_certificates_end_the_start_and_name_the_flag(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_text("no certificate")
    for files, flag in (
        ({"redis_ca_file": tmp_path / "missing"}, "--redis-ca-file"),
        ({"redis_ca_file": garbage}, "--redis-ca-file"),
        ({"redis_cert_file": garbage}, "--redis-cert-file"),
    ):
        with pytest.raises(CannotStart, match=flag):
            async with running_cache("rediss://127.0.0.1:1", **files):
                pass


# Users


@pytest.fixture
async def with_users(tmp_path: Path) -> AsyncIterator[Server]:
    users = (
        "user default off",
        "user baton on >sesame ~baton:* resetchannels +@read +@write +@connection",
        "user reader on >sesame ~baton:* resetchannels +@read +@connection",
        "user stranger on >sesame ~other:* resetchannels +@all",
    )
    server = Server(tmp_path / "redis", *users)
    with running(server):
        yield server


async def test_acl_user(with_users: Server, tmp_path: Path) -> None:
    password_file = tmp_path / "password"
    password_file.write_text("sesame\n")
    address = f"127.0.0.1:{with_users.port}"
    for url, settings in (
        (f"redis://baton:sesame@{address}", {}),
        (f"redis://{address}", {"redis_username": "baton", "redis_password": "sesame"}),
        (f"redis://baton@{address}", {"redis_password_file": password_file}),
    ):
        async with running_cache(url, **settings) as cache:
            assert await works(cache), settings


@pytest.mark.parametrize("who", ["baton:wrong", "nobody:sesame", "", ":sesame"])
async def test_wrong_password(with_users: Server, who: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running_cache(f"redis://{who}@127.0.0.1:{with_users.port}", **QUICK) as cache:
        for _ in range(5):
            assert not await cache.fill(cache_key(), an_answer())
            assert await cache.miss(cache_key()) == FAILED
    assert "sesame" not in caplog.text


async def test_acl_that_denies(with_users: Server, caplog: pytest.LogCaptureFixture) -> None:
    address = f"127.0.0.1:{with_users.port}"
    async with running_cache(f"redis://baton:sesame@{address}") as cache:
        assert await works(cache)
    async with running_cache(f"redis://reader:sesame@{address}") as cache:
        assert not await cache.fill(cache_key((1,)), an_answer())
        assert (await cache.lookup(cache_key())).hit, "it may read"
    assert "Redis refuses to set: NOPERM" in caplog.text
    async with running_cache(f"redis://stranger:sesame@{address}") as cache:
        assert not await cache.fill(cache_key(), an_answer())
        assert await cache.miss(cache_key()) == FAILED


# Replicas and Sentinel


async def test_a_replica_is_read_only(tmp_path: Path) -> None:
    master = Server(tmp_path / "master")
    replica = Server(tmp_path / "replica", f"replicaof 127.0.0.1 {master.port}")
    with running(master, replica):
        async with running_cache(f"redis://127.0.0.1:{master.port}") as cache:
            assert await works(cache)
        with replica.client() as client:
            await eventually(lambda: _there(client), 20)
        async with running_cache(f"redis://127.0.0.1:{replica.port}") as cache:
            for _ in range(5):
                assert not await cache.fill(cache_key((1,)), an_answer())
            assert (await cache.lookup(cache_key())).hit, "what is there is still served"


async def _there(client: redis.Redis) -> bool:
    return bool(client.exists(name_of(cache_key())))


class Watched:
    """A master, a replica, and three sentinels over them."""

    def __init__(self, directory: Path) -> None:
        self.master = Server(directory / "master")
        self.replica = Server(directory / "replica", f"replicaof 127.0.0.1 {self.master.port}")
        monitor = (
            f"sentinel monitor mesh 127.0.0.1 {self.master.port} 2",
            "sentinel down-after-milliseconds mesh 500",
            "sentinel failover-timeout mesh 3000",
        )
        self.sentinels = [Server(directory / f"sentinel{i}", *monitor, sentinel=True) for i in range(3)]
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/mesh"

    async def ready(self) -> None:
        """Wait until every sentinel knows the others and the replica: before, none of them can fail over."""

        async def complete() -> bool:
            return all(self._knows(sentinel) for sentinel in self.sentinels)

        await eventually(complete, 60)

    def _knows(self, sentinel: Server) -> bool:
        with sentinel.client() as client:
            state = client.sentinel_master("mesh")
        return (state["num-slaves"], state["num-other-sentinels"]) == (1, 2)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    these = Watched(tmp_path)
    with running(these.master, these.replica, *these.sentinels):
        yield these


@pytest.mark.parametrize("fault", [signal.SIGKILL, FREEZE], ids=["killed", "frozen"])
async def test_sentinel_failover(watched: Watched, fault: signal.Signals) -> None:
    await watched.ready()
    async with running_cache(watched.url, **QUICK) as cache:
        assert await works(cache)
        watched.master.signal(fault)
        assert not (await cache.lookup(cache_key())).hit
        await eventually(lambda: works(cache), 60)
        with watched.replica.client() as client:
            assert client.role()[0] == b"master"
            assert await _there(client)


async def test_sentinel_switches_masters_that_both_live(watched: Watched) -> None:
    """The old master goes on answering, as a replica: reads still work there, but changes are told elsewhere."""
    await watched.ready()
    async with running_cache(watched.url, local_bytes=10**6, local_ping_seconds=0.1, **QUICK) as cache:
        assert await works(cache)
        with watched.sentinels[0].client() as sentinel:
            sentinel.execute_command("SENTINEL", "FAILOVER", "mesh")
        with watched.replica.client() as new:

            async def switched() -> bool:
                return new.role()[0] == b"master" and await cache.fill(cache_key((1,)), an_answer())

            await eventually(switched, 60)

            async def forgotten() -> bool:
                return not (await cache.lookup(cache_key())).hit

            await eventually(lambda: _held(cache), 20)
            new.unlink(name_of(cache_key()))
            await eventually(forgotten, 10)


async def _held(cache: Cache) -> bool:
    """Look up; whether the answer was in memory. If it is nowhere, it is stored."""
    name, labels = "baton_cache_hits_total", {"tier": "local"}
    before = REGISTRY.get_sample_value(name, labels)
    if not (await cache.lookup(cache_key())).hit:
        await cache.fill(cache_key(), an_answer())
    return REGISTRY.get_sample_value(name, labels) != before


async def test_a_sentinel_is_frozen_and_one_is_down(watched: Watched) -> None:
    watched.sentinels[0].signal(FREEZE)
    watched.sentinels[1].kill()
    async with running_cache(watched.url, **QUICK) as cache:
        assert await works(cache)


async def test_no_sentinel_answers_at_start(watched: Watched) -> None:
    for sentinel in watched.sentinels:
        sentinel.kill()
    async with running_cache(watched.url, **QUICK) as cache:
        assert await cache.miss(cache_key()) == FAILED
        for sentinel in watched.sentinels:
            sentinel.start()
        await eventually(lambda: works(cache), 20)
        for sentinel in watched.sentinels:
            sentinel.kill()
        assert await works(cache), "who knows the master does not need them"


async def test_sentinels_that_know_no_such_master(watched: Watched) -> None:
    async with running_cache(watched.url.replace("/mesh", "/other"), **QUICK) as cache:
        assert await cache.miss(cache_key()) == FAILED


# Cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[list[Server]]:
    servers = a_cluster(tmp_path)
    with running(*servers):
        await asyncio.to_thread(join, servers)
        yield servers


def url_of(servers: list[Server]) -> str:
    """Of a cluster."""
    return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


async def test_cluster(cluster: list[Server]) -> None:
    async with running_cache(url_of(cluster[:1])) as cache:
        keys = [cache_key((i,)) for i in range(60)]
        for i, key in enumerate(keys):
            assert await cache.fill(key, an_answer(str(i)))
        for i, key in enumerate(keys):
            assert (await cache.lookup(key)).answer == an_answer(str(i))
    for server in cluster:
        with server.client() as client:
            assert 5 < client.dbsize() < 40, "each holds a share"


async def test_the_rights_that_are_documented_do_for_a_cluster(cluster: list[Server]) -> None:
    rights = documented_rights(cluster=True)
    for server in cluster:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "mesh", "on", ">sesame", *rights)
    url = url_of(cluster).replace("//", "//mesh:sesame@")
    async with running_cache(url, **QUICK) as cache:
        assert await works(cache)


async def test_a_lost_server_of_a_cluster_costs_only_its_share(cluster: list[Server]) -> None:
    async with running_cache(url_of(cluster), **QUICK) as cache:
        keys = [cache_key((i,)) for i in range(60)]
        for key in keys:
            assert await cache.fill(key, an_answer())
        with cluster[1].client() as client:
            its_share = client.dbsize()
        cluster[1].signal(FREEZE)
        found = [(await cache.lookup(key)).hit for key in keys]
        assert found.count(False) == its_share


async def test_a_slot_moves(cluster: list[Server]) -> None:
    key = cache_key()
    async with running_cache(url_of(cluster), **QUICK) as cache:
        assert await cache.fill(key, an_answer())
        clients = [server.client() for server in cluster]
        slot = int(clients[0].execute_command("CLUSTER", "KEYSLOT", name_of(key)))
        source = slot * 3 // 16384
        target = (source + 1) % 3
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        clients[source].execute_command("MIGRATE", "127.0.0.1", cluster[target].port, name_of(key), 0, 5000)
        assert not (await cache.lookup(key)).hit, "while it moves, what has moved is a miss"
        for client in (clients[target], clients[source]):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        assert (await cache.lookup(key)).hit, "the call goes where it is sent"
        for client in clients:
            client.close()


async def test_a_cluster_that_is_not_there_at_start(cluster: list[Server]) -> None:
    for server in cluster:
        server.kill()
    async with running_cache(url_of(cluster), **QUICK) as cache:
        assert await cache.miss(cache_key()) == FAILED
        for server in cluster:
            server.start()
        await eventually(lambda: works(cache), 30)


async def test_a_single_server_is_no_cluster(tmp_path: Path) -> None:
    server = Server(tmp_path / "redis")
    with running(server):
        async with running_cache(url_of([server]), **QUICK) as cache:
            assert await cache.miss(cache_key()) == FAILED
