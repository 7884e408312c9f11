"""A fleet of real parts on one machine, disturbed by a seeded schedule and judged by an oracle.

sandbox.py   private namespaces: network, mounts, processes; a name server that can fall silent
fleet.py     the sites, the devices and what is known of their faults
parts.py     the processes: broker, collector; devices.py: agents on Linux, agents on MicroPython
chaos.py     the schedule: which fault, when, on whom, for how long
faults.py    what a fault does: to processes, disks and the network; faults_of_identity.py: to keys, accounts and clocks
oracle.py    what must be in the database, and what must have been reported
run.py       puts them together: `python -m stonechat_tools.proofs.world --minutes 2 --seed 7`
"""
