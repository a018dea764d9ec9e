"""The client of etcd, with three real members and mutual TLS. The scenarios are in etcd_worker.py."""

from __future__ import annotations

import subprocess

from cluster.lab import Etcd3


def test_transactions(etcd3: Etcd3) -> None:
    etcd3.worker("transactions")


def test_a_watch_goes_on_over_the_end_of_its_member_and_of_the_leader(etcd3: Etcd3) -> None:
    etcd3.worker("watch_survives_members")


def test_history_that_was_compacted_is_listed_anew(etcd3: Etcd3) -> None:
    etcd3.worker("compaction")


def test_a_listing_outlives_a_compaction_between_its_pages(etcd3: Etcd3) -> None:
    etcd3.worker("compaction_between_pages")


def test_a_node_is_removed_while_it_still_runs(etcd3: Etcd3) -> None:
    etcd3.worker("removal")


def test_keys_go_with_their_lease(etcd3: Etcd3) -> None:
    etcd3.worker("leases")


def test_without_a_majority_calls_say_so(etcd3: Etcd3) -> None:
    etcd3.worker("without_a_majority")


def test_mutual_tls(etcd3: Etcd3) -> None:
    text = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=x -keyout stranger.key -out stranger.pem"
    subprocess.run(["sh", "-ec", text], cwd=etcd3.certificates, capture_output=True, check=True)
    etcd3.worker("strangers")
