#!/usr/bin/env bash
# A fake Ray: listens where a head would, and stays.
for option in "$@"; do
  case $option in
    --port=*) port=${option#--port=} ;;
    --node-ip-address=*) address=${option#--node-ip-address=} ;;
  esac
done
[[ -n $port ]] || exec sleep infinity
exec perl -MIO::Socket::INET -e '
  my $socket = IO::Socket::INET->new(LocalAddr => $ARGV[0], LocalPort => $ARGV[1], Listen => 9, ReuseAddr => 1) or die $!;
  while (my $client = $socket->accept) { close $client }' "$address" "$port"
