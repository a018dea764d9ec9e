# An engine's first steps from Ruby, with generated stubs in lib/: client.rb ADDRESS NETWORK NETNS.
# Lists networks, makes one, attaches a network namespace, watches what happened, takes everything away.
$LOAD_PATH.unshift(File.join(__dir__, "lib"))
require "netstore/v1/endpoint_services_pb"
require "netstore/v1/network_services_pb"
require "netstore/v1/system_services_pb"
include Netstore::V1

address, name, netns = ARGV
networks, endpoints, system = [NetworkService, EndpointService, SystemService].map do |service|
  service::Stub.new(address.sub("unix://", "unix:"), :this_channel_is_insecure)
end

begin
  found, token = [], ""
  loop do
    page = networks.list_networks(ListNetworksRequest.new(page_size: 500, page_token: token))
    found.concat(page.networks.map(&:name))
    break if (token = page.next_page_token).empty?
  end
  puts "networks: #{found.join(' ')}"
  wanted = Network.new(name: name, labels: { "made-by" => "ruby" })
  network = networks.create_network(CreateNetworkRequest.new(network: wanted)).network
  puts "created #{network.name}"

  spec = EndpointSpec.new(network: name, sandbox: SandboxRef.new(netns_path: netns))
  endpoint = endpoints.attach_endpoint(AttachEndpointRequest.new(endpoint: Endpoint.new(spec: spec))).endpoint
  puts "attached #{endpoint.status.interface_name} #{endpoint.status.addresses.to_a.join(' ')}"

  system.watch_events(WatchEventsRequest.new(revision: 0)).each do |response|
    event = response.event
    puts "event #{event.kind} #{event.action}" if [network.id, endpoint.id].include?(event.resource_id)
    break if event.resource_id == endpoint.id
  end
  endpoints.detach_endpoint(DetachEndpointRequest.new(endpoint: endpoint.id))
  networks.delete_network(DeleteNetworkRequest.new(network: name))
  puts "removed #{name}"
rescue GRPC::BadStatus => error
  abort error.details
end
