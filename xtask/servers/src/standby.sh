# Two PostgreSQL servers in one container: on 5432 the primary, on 5433 a standby of it, which begins as
# a copy of its files and then repeats what it writes.
# <https://www.postgresql.org/docs/current/warm-standby.html>
set -eu
PATH=/opt/postgres/bin:$PATH
cd /
echo test > /tmp/password
initdb --no-sync --no-instructions -D /tmp/primary -U postgres --pwfile=/tmp/password -A scram-sha-256 -E UTF8
echo "host replication all all scram-sha-256" >> /tmp/primary/pg_hba.conf
echo "host all all all scram-sha-256" >> /tmp/primary/pg_hba.conf
cat >> /tmp/primary/postgresql.conf <<'SETTINGS'
listen_addresses = '*'
unix_socket_directories = '/tmp'
SETTINGS
cp -a /tmp/primary /tmp/standby
cat >> /tmp/standby/postgresql.conf <<'SETTINGS'
port = 5433
primary_conninfo = 'host=127.0.0.1 user=postgres password=test'
SETTINGS
: > /tmp/standby/standby.signal
# Neither is the container's first process, which no signal would stop.
postgres -D /tmp/primary &
postgres -D /tmp/standby &
wait
