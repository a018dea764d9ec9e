// An engine's first steps from Node.js, no code generated: client.js ADDRESS NETWORK NETNS.
// Lists networks, makes one, attaches a network namespace, watches what happened, takes everything away.
'use strict';
const path = require('node:path');
const { promisify } = require('node:util');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const proto = path.join(__dirname, '../../../proto');
const files = ['network', 'endpoint', 'system'].map((noun) => `netstore/v1/${noun}.proto`);
const loaded = loader.loadSync(files, { includeDirs: [proto], keepCase: true, enums: String, longs: Number, defaults: true });
const { v1 } = grpc.loadPackageDefinition(loaded).netstore;

async function main(address, name, netns) {
  const connect = (Service) => new Service(address.replace('unix://', 'unix:'), grpc.credentials.createInsecure());
  const [networks, endpoints, system] = [v1.NetworkService, v1.EndpointService, v1.SystemService].map(connect);
  const call = (service, method, request) => promisify(service[method]).call(service, request);

  const found = [];
  for (let token = ''; ; ) {
    const page = await call(networks, 'ListNetworks', { page_size: 500, page_token: token });
    found.push(...page.networks.map((each) => each.name));
    token = page.next_page_token;
    if (!token) break;
  }
  console.log('networks:', ...found);
  const { network } = await call(networks, 'CreateNetwork', { network: { name, labels: { 'made-by': 'node' } } });
  console.log('created', network.name);

  const spec = { network: name, sandbox: { netns_path: netns } };
  const { endpoint } = await call(endpoints, 'AttachEndpoint', { endpoint: { spec } });
  console.log('attached', endpoint.status.interface_name, ...endpoint.status.addresses);

  const events = system.WatchEvents({ revision: 0 });
  for await (const { event } of events) {
    if ([network.id, endpoint.id].includes(event.resource_id)) console.log('event', event.kind, event.action);
    if (event.resource_id === endpoint.id) break;
  }
  events.on('error', () => {}); // that it was cancelled
  events.cancel();
  await call(endpoints, 'DetachEndpoint', { endpoint: endpoint.id });
  await call(networks, 'DeleteNetwork', { network: name });
  console.log('removed', name);
  [networks, endpoints, system].forEach((service) => service.close());
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.details || error);
  process.exitCode = 1;
});
