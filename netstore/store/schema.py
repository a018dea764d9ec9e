"""The database's schema, as a list of migrations: version n is reached by running the first n of them.

The constraints here are what makes double allocation impossible (DESIGN, rule 2): an address, a MAC, an interface name,
a host port and a name are columns of unique keys, and triggers refuse what a key cannot express (overlapping subnets,
a wildcard port beside one of a single address).
"""

from __future__ import annotations

__all__ = ["MIGRATIONS", "OVERLAP", "PORT_TAKEN"]

OVERLAP = "subnet overlaps"
PORT_TAKEN = "port taken"

MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

    CREATE TABLE networks (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL UNIQUE, body TEXT NOT NULL
    ) WITHOUT ROWID;

    -- Addresses are packed bytes (4 or 16), so that they order as numbers. `cursor` is the last one given dynamically.
    CREATE TABLE subnets (
        network_id TEXT NOT NULL REFERENCES networks(id) ON DELETE CASCADE,
        subnet TEXT NOT NULL UNIQUE, first BLOB NOT NULL, last BLOB NOT NULL, cursor BLOB NOT NULL
    );
    CREATE INDEX subnets_by_network ON subnets(network_id);
    CREATE TRIGGER subnets_do_not_overlap BEFORE INSERT ON subnets
    WHEN EXISTS (SELECT 1 FROM subnets WHERE length(first) = length(NEW.first)
                 AND first <= NEW.last AND last >= NEW.first)
    BEGIN SELECT RAISE(ABORT, '{OVERLAP}'); END;

    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY, path TEXT UNIQUE, inode INTEGER NOT NULL, container_id TEXT NOT NULL, body TEXT NOT NULL
    ) WITHOUT ROWID;

    CREATE INDEX sandboxes_by_inode ON sandboxes(inode);

    CREATE TABLE endpoints (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, created INTEGER NOT NULL UNIQUE,
        network_id TEXT NOT NULL REFERENCES networks(id),
        sandbox_id TEXT NOT NULL REFERENCES sandboxes(id),
        mac TEXT, interface_name TEXT, body TEXT NOT NULL,
        UNIQUE (network_id, sandbox_id), UNIQUE (sandbox_id, interface_name), UNIQUE (network_id, mac)
    ) WITHOUT ROWID;

    -- The owner is the endpoint that holds the address, or the network for gateways and auxiliary addresses.
    CREATE TABLE addresses (
        network_id TEXT NOT NULL REFERENCES networks(id) ON DELETE CASCADE,
        address BLOB NOT NULL,
        endpoint_id TEXT REFERENCES endpoints(id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
        PRIMARY KEY (network_id, address)
    ) WITHOUT ROWID;
    CREATE INDEX addresses_by_endpoint ON addresses(endpoint_id);

    -- What netstore-resolver answers. Lower case; several endpoints may share a name (round robin).
    CREATE TABLE names (
        network_id TEXT NOT NULL REFERENCES networks(id) ON DELETE CASCADE, name TEXT NOT NULL,
        endpoint_id TEXT NOT NULL REFERENCES endpoints(id) ON DELETE CASCADE,
        PRIMARY KEY (network_id, name, endpoint_id)
    ) WITHOUT ROWID;
    CREATE INDEX names_by_endpoint ON names(endpoint_id);

    -- host_ip '' is every address of the node; a range has its first port in host_port. Ranges are few: they have an
    -- index of their own, so that a single port's check costs the same however many there are.
    CREATE TABLE ports (
        host_ip TEXT NOT NULL, protocol TEXT NOT NULL, host_port INTEGER NOT NULL, last_port INTEGER NOT NULL,
        container_port INTEGER NOT NULL,
        endpoint_id TEXT NOT NULL REFERENCES endpoints(id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
        PRIMARY KEY (protocol, host_port, host_ip)
    ) WITHOUT ROWID;
    CREATE INDEX ports_by_endpoint ON ports(endpoint_id);
    CREATE INDEX ports_of_ranges ON ports(protocol, host_port) WHERE last_port > host_port;
    CREATE TRIGGER ports_do_not_clash BEFORE INSERT ON ports
    WHEN EXISTS (SELECT 1 FROM ports WHERE protocol = NEW.protocol
                 AND host_port BETWEEN NEW.host_port AND NEW.last_port
                 AND (host_ip = NEW.host_ip OR host_ip = '' OR NEW.host_ip = ''))
      OR EXISTS (SELECT 1 FROM ports INDEXED BY ports_of_ranges
                 WHERE protocol = NEW.protocol AND last_port > host_port
                 AND host_port < NEW.host_port AND last_port >= NEW.host_port
                 AND (host_ip = NEW.host_ip OR host_ip = '' OR NEW.host_ip = ''))
    BEGIN SELECT RAISE(ABORT, '{PORT_TAKEN}'); END;

    CREATE TABLE volumes (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL UNIQUE, body TEXT NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE images (
        id TEXT PRIMARY KEY, name TEXT UNIQUE, created INTEGER NOT NULL UNIQUE, body TEXT NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE containers (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL UNIQUE,
        image_id TEXT NOT NULL REFERENCES images(id),
        sandbox_id TEXT NOT NULL REFERENCES sandboxes(id), body TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX containers_by_sandbox ON containers(sandbox_id);
    CREATE INDEX containers_by_image ON containers(image_id);

    -- A row here is what makes a volume "in use": from the container's create to its remove.
    CREATE TABLE volume_uses (
        volume_id TEXT NOT NULL REFERENCES volumes(id),
        container_id TEXT NOT NULL REFERENCES containers(id) ON DELETE CASCADE,
        PRIMARY KEY (volume_id, container_id)
    ) WITHOUT ROWID;
    CREATE INDEX volume_uses_by_container ON volume_uses(container_id);

    CREATE TABLE events (
        revision INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, action TEXT NOT NULL,
        resource_id TEXT NOT NULL, resource_name TEXT NOT NULL, attributes TEXT NOT NULL
    );

    -- Answers to repeated requests: request_id -> what it made.
    CREATE TABLE requests (
        request_id TEXT PRIMARY KEY, method TEXT NOT NULL, resource_ids TEXT NOT NULL, time REAL NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    -- Snapshots go with their volume, which may be in the trash: hence no foreign key.
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY, volume_id TEXT NOT NULL, name TEXT NOT NULL, created INTEGER NOT NULL UNIQUE,
        body TEXT NOT NULL, UNIQUE (volume_id, name)
    ) WITHOUT ROWID;

    -- When the last snapshot of a schedule was due, so that what was missed is made once.
    CREATE TABLE snapshot_schedules (
        volume_id TEXT PRIMARY KEY REFERENCES volumes(id) ON DELETE CASCADE, last REAL NOT NULL
    ) WITHOUT ROWID;

    -- Names are free again here: several may have the same.
    CREATE TABLE trash (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, created INTEGER NOT NULL UNIQUE, body TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    -- Who holds a volume staged besides containers: names that engines gave (StageVolume).
    CREATE TABLE volume_stages (
        volume_id TEXT NOT NULL REFERENCES volumes(id), holder TEXT NOT NULL, PRIMARY KEY (volume_id, holder)
    ) WITHOUT ROWID;
    """,
    """
    -- Policies go with their network. Endpoints of containers get the container's labels, which policies select by.
    CREATE TABLE policies (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL UNIQUE,
        network_id TEXT NOT NULL REFERENCES networks(id) ON DELETE CASCADE, body TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX policies_by_network ON policies(network_id);

    UPDATE endpoints SET body = json_set(endpoints.body, '$.labels', json_extract(c.body, '$.labels'))
    FROM sandboxes s JOIN containers c ON c.id = s.container_id
    WHERE s.id = endpoints.sandbox_id AND json_extract(endpoints.body, '$.labels') = '{}'
      AND json_type(c.body, '$.labels') = 'object';
    """,
    """
    -- Mounts in namespaces that are no container's; `inode` is the namespace's. A volume that one shows is in use.
    CREATE TABLE mounts (
        id TEXT PRIMARY KEY, created INTEGER NOT NULL UNIQUE, inode INTEGER NOT NULL, target TEXT NOT NULL,
        place TEXT NOT NULL, volume_id TEXT REFERENCES volumes(id), body TEXT NOT NULL, UNIQUE (inode, target)
    ) WITHOUT ROWID;
    CREATE INDEX mounts_by_volume ON mounts(volume_id);
    """,
    """
    -- What the cluster shares, as this node saw it last. `up` says that a node held its lease.
    CREATE TABLE nodes (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, created INTEGER NOT NULL, up INTEGER NOT NULL, body TEXT NOT NULL
    ) WITHOUT ROWID;

    -- Networks that every node has.
    CREATE TABLE global_networks (
        network_id TEXT PRIMARY KEY REFERENCES networks(id) ON DELETE CASCADE, vni INTEGER NOT NULL UNIQUE
    ) WITHOUT ROWID;

    -- Endpoints of other nodes. Their addresses are rows of `addresses` without an endpoint, too.
    CREATE TABLE remote_endpoints (
        id TEXT PRIMARY KEY, network_id TEXT NOT NULL REFERENCES networks(id) ON DELETE CASCADE,
        node_id TEXT NOT NULL, body TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX remote_endpoints_by_network ON remote_endpoints(network_id);
    CREATE INDEX remote_endpoints_by_node ON remote_endpoints(node_id);
    CREATE TABLE remote_names (
        network_id TEXT NOT NULL, name TEXT NOT NULL,
        endpoint_id TEXT NOT NULL REFERENCES remote_endpoints(id) ON DELETE CASCADE,
        PRIMARY KEY (network_id, name, endpoint_id)
    ) WITHOUT ROWID;
    CREATE INDEX remote_names_by_endpoint ON remote_names(endpoint_id);
    CREATE TABLE remote_addresses (
        network_id TEXT NOT NULL, address BLOB NOT NULL,
        endpoint_id TEXT NOT NULL REFERENCES remote_endpoints(id) ON DELETE CASCADE,
        PRIMARY KEY (network_id, address, endpoint_id)
    ) WITHOUT ROWID;
    CREATE INDEX remote_addresses_by_endpoint ON remote_addresses(endpoint_id);

    -- Changes of this node's endpoints on such networks that etcd has not heard of yet; `body` as the last one was, for
    -- one that is gone. Triggers write it, so that no change is forgotten, whoever makes it.
    CREATE TABLE unpublished (
        serial INTEGER PRIMARY KEY AUTOINCREMENT,
        endpoint_id TEXT NOT NULL, network_id TEXT NOT NULL, body TEXT NOT NULL
    );
    CREATE TRIGGER endpoints_made AFTER INSERT ON endpoints
    WHEN EXISTS (SELECT 1 FROM global_networks WHERE network_id = NEW.network_id)
    BEGIN INSERT INTO unpublished (endpoint_id, network_id, body) VALUES (NEW.id, NEW.network_id, NEW.body); END;
    CREATE TRIGGER endpoints_changed AFTER UPDATE ON endpoints
    WHEN EXISTS (SELECT 1 FROM global_networks WHERE network_id = NEW.network_id)
    BEGIN INSERT INTO unpublished (endpoint_id, network_id, body) VALUES (NEW.id, NEW.network_id, NEW.body); END;
    CREATE TRIGGER endpoints_gone AFTER DELETE ON endpoints
    WHEN EXISTS (SELECT 1 FROM global_networks WHERE network_id = OLD.network_id)
    BEGIN INSERT INTO unpublished (endpoint_id, network_id, body) VALUES (OLD.id, OLD.network_id, OLD.body); END;

    -- Global networks that were removed here while etcd was away.
    CREATE TABLE unpublished_removals (network_id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
    """,
    """
    -- Lists of volumes are read page by page, in this order.
    CREATE INDEX volumes_by_age ON volumes(json_extract(body, '$.create_time'), id);
    """,
    """
    -- What a runtime attached through CNI is found by: its container's id, a label.
    CREATE INDEX endpoints_by_cni ON endpoints(json_extract(body, '$.labels."cni.container-id"'))
    WHERE json_extract(body, '$.labels."cni.container-id"') IS NOT NULL;
    """,
    f"""
    -- Services go with their network, which is not removed while it has some. Those of networks that span nodes are as
    -- the cluster has them.
    CREATE TABLE services (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
        network_id TEXT NOT NULL REFERENCES networks(id) ON DELETE CASCADE, body TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX services_by_network ON services(network_id);

    -- Ports of the node that lead to services. Others' ports are refused beside them, and the other way round.
    CREATE TABLE service_ports (
        protocol TEXT NOT NULL, port INTEGER NOT NULL,
        service_id TEXT NOT NULL REFERENCES services(id) ON DELETE CASCADE, PRIMARY KEY (protocol, port)
    ) WITHOUT ROWID;
    CREATE INDEX service_ports_by_service ON service_ports(service_id);
    CREATE TRIGGER ports_are_no_services BEFORE INSERT ON ports
    WHEN EXISTS (SELECT 1 FROM service_ports WHERE protocol = NEW.protocol
                 AND port BETWEEN NEW.host_port AND NEW.last_port)
    BEGIN SELECT RAISE(ABORT, '{PORT_TAKEN}'); END;

    -- Which endpoints of this node answered as a service's health check asks.
    CREATE TABLE service_health (
        service_id TEXT NOT NULL REFERENCES services(id) ON DELETE CASCADE,
        endpoint_id TEXT NOT NULL REFERENCES endpoints(id) ON DELETE CASCADE,
        PRIMARY KEY (service_id, endpoint_id)
    ) WITHOUT ROWID;
    CREATE INDEX service_health_by_endpoint ON service_health(endpoint_id);
    """,
    """
    -- Health is told to the cluster, as every change of an endpoint is.
    CREATE TRIGGER health_gained AFTER INSERT ON service_health BEGIN
        INSERT INTO unpublished (endpoint_id, network_id, body) SELECT id, network_id, body FROM endpoints
        WHERE id = NEW.endpoint_id AND network_id IN (SELECT network_id FROM global_networks);
    END;
    CREATE TRIGGER health_lost AFTER DELETE ON service_health BEGIN
        INSERT INTO unpublished (endpoint_id, network_id, body) SELECT id, network_id, body FROM endpoints
        WHERE id = OLD.endpoint_id AND network_id IN (SELECT network_id FROM global_networks);
    END;
    """,
    """
    -- What an OCI runtime's hook attached is found by its container's id, a label, too.
    CREATE INDEX endpoints_by_oci ON endpoints(json_extract(body, '$.labels."oci.container-id"'))
    WHERE json_extract(body, '$.labels."oci.container-id"') IS NOT NULL;
    """,
    f"""
    -- Ports that every node publishes, of endpoints of other nodes; `held` says that this node does.
    CREATE TABLE mesh_ports (
        endpoint_id TEXT NOT NULL REFERENCES remote_endpoints(id) ON DELETE CASCADE,
        protocol TEXT NOT NULL, port INTEGER NOT NULL, held INTEGER NOT NULL,
        PRIMARY KEY (endpoint_id, protocol, port)
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX mesh_ports_held ON mesh_ports(protocol, port) WHERE held;
    CREATE TRIGGER ports_are_no_mesh BEFORE INSERT ON ports
    WHEN EXISTS (SELECT 1 FROM mesh_ports WHERE held AND protocol = NEW.protocol
                 AND port BETWEEN NEW.host_port AND NEW.last_port)
    BEGIN SELECT RAISE(ABORT, '{PORT_TAKEN}'); END;
    """,
)
