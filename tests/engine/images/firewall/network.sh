#!/bin/sh
# Runs in the container of tests/engine/test_firewall.py, which it makes into a home network: this namespace is machine A
# (10.77.0.1) with a "container" behind DNAT as Docker does it, and the namespaces b (10.77.0.2) and stranger (10.77.0.3)
# are two others. Nothing outside of this container is touched.
set -e
ip link set lo up
ip link add lan0 type bridge
ip addr add 10.77.0.1/24 dev lan0
ip link set lan0 up
for name in b:2 stranger:3; do
    namespace=${name%:*}
    ip netns add "$namespace"
    ip link add "veth-$namespace" type veth peer name eth0 netns "$namespace"
    ip link set "veth-$namespace" master lan0 up
    ip -n "$namespace" addr add "10.77.0.${name#*:}/24" dev eth0
    ip -n "$namespace" link set eth0 up
    ip -n "$namespace" link set lo up
    ip -n "$namespace" route add default via 10.77.0.1
done
ip netns add inside
ip link add br-noodle type bridge
ip addr add 172.30.0.1/16 dev br-noodle
ip link set br-noodle up
ip link add veth-inside type veth peer name eth0 netns inside
ip link set veth-inside master br-noodle up
ip -n inside addr add 172.30.0.2/16 dev eth0
ip -n inside link set eth0 up
ip -n inside link set lo up
ip -n inside route add default via 172.30.0.1

# as Docker leaves it: published ports are rewritten before routing, and every forwarded packet asks DOCKER-USER first
iptables -N DOCKER-USER
iptables -A DOCKER-USER -j RETURN
iptables -A FORWARD -j DOCKER-USER
for port in 8080 6379 8081 3000 9999; do
    iptables -t nat -A PREROUTING -d 10.77.0.1 -p tcp --dport "$port" -j DNAT --to-destination "172.30.0.2:$((port + 10000))"
done
iptables -t nat -A POSTROUTING -s 172.30.0.0/16 ! -o br-noodle -j MASQUERADE

for port in 18080 16379 18081 13000 19999; do
    ip netns exec inside python3 -m http.server "$port" --directory /tmp >/dev/null 2>&1 &
done
python3 -m http.server 22 --directory /tmp >/dev/null 2>&1 & # stands for ssh on machine A itself
touch /tmp/network-is-up
exec sleep infinity
