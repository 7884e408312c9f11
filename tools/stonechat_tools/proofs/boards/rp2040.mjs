// node rp2040.mjs FIRMWARE.bin [--littlefs=IMAGE@AT] [--romfs=IMAGE@AT] [--uart=FD] [--paced] [--kept=IMAGE@AT+SIZE]
// [--plain] [--digest=N]: a Raspberry Pi Pico in rp2040js, its USB serial port on stdin and stdout, its UART 0 at
// 115,200 baud on the descriptor FD (what it sends leaves at once). AT: bytes from the flash's start.
// --paced: its clock never runs faster than this machine's, for a peer that answers in real time. What it was slower is
// not made up for: else the board's waits would pass in no time until it is. --kept: a reset by the watchdog writes
// that piece of the flash to IMAGE, and ends this. --plain: without faster.mjs. --digest: prints a hash of the machine
// after N instructions.
// The flash behind the SSI takes erase and program commands, which rp2040js does not have; littlefs needs them.
import crypto from 'crypto';
import fs from 'fs';
import net from 'net';
import { Simulator, USBCDC, ConsoleLogger, LogLevel } from 'rp2040js';
import { faster } from './faster.mjs';

const sim = new Simulator();
const mcu = sim.rp2040;
mcu.loadBootrom(new Uint32Array(JSON.parse(fs.readFileSync(new URL('bootrom.json', import.meta.url)))));
mcu.logger = new ConsoleLogger(LogLevel.Error);
mcu.flash.fill(0xff);
mcu.flash.set(fs.readFileSync(process.argv[2]), 0);
const option = (name) => (process.argv.find((word) => word.startsWith(`--${name}=`)) || '').slice(name.length + 3);
for (const name of ['romfs', 'littlefs']) {
  const [image, at] = option(name).split('@');
  if (image) mcu.flash.set(fs.readFileSync(image), +at);
}

const ssi = mcu.peripherals[0x18000];
let writable = false, sent = [], received = [], selected = false, override = 0;
function shift(value) {
  sent.push(value);
  const at = sent.length - 1, command = sent[0];
  if (at === 0) {
    if (command === 6) writable = true;
    else if (command === 4) writable = false;
    return 0xff;
  }
  if (command === 5) return writable ? 2 : 0;
  if (command === 0x35) return 2;
  if (command === 1) return 0;
  if (command === 0x9f) return [0xef, 0x40, 0x15][at - 1] || 0;
  if (command === 3 && at >= 4) {
    const address = (sent[1] << 16 | sent[2] << 8 | sent[3]) + at - 4;
    return address < mcu.flash.length ? mcu.flash[address] : 0xff;
  }
  return 0xff;
}
function apply() {
  if (!sent.length) return;
  const command = sent[0], address = sent[1] << 16 | sent[2] << 8 | sent[3];
  if ((command === 0x20 || command === 0xd8) && sent.length >= 4) {
    const size = command === 0x20 ? 4096 : 65536;
    if (writable) mcu.flash.fill(0xff, address & ~(size - 1), (address & ~(size - 1)) + size);
    writable = false;
  } else if (command === 2 && sent.length > 4) {
    const data = sent.slice(4, 260);
    if (writable) for (let i = 0; i < data.length; i++) mcu.flash[address + i] &= data[i];
    writable = false;
  } else if (command === 1) writable = false;
  sent = [];
}
const read = ssi.readUint32.bind(ssi), write = ssi.writeUint32.bind(ssi);
ssi.readUint32 = (offset) => {
  if (offset === 0x24) return received.length;
  if (offset === 0x28) return 6 | (received.length ? 8 : 0);
  if (offset === 0x60) return received.length ? received.shift() : 0;
  return read(offset);
};
ssi.writeUint32 = (offset, value) => {
  if (offset === 0x60) {
    if (ssi.ssienr) {
      if (override === 0 && !received.length) { apply(); sent = []; }
      received.push(override !== 3 ? shift(value & 0xff) : 0xff);
    }
    return;
  }
  if (offset === 0x24) return;
  if (offset === 0x08 && !(value & 1)) { received = []; if (override === 0) apply(); }
  write(offset, value);
};
// The random bit of the ring oscillator, which rp2040js has not: os.urandom() would give the same bytes for ever.
const rosc = mcu.peripherals[0x40060], roscRead = rosc.readUint32.bind(rosc);
let dice = option('digest') ? 1 : crypto.randomInt(1, 2 ** 31);
rosc.readUint32 = (offset) => {
  if (offset !== 0x1c) return roscRead(offset);
  dice ^= dice << 13;
  dice ^= dice >>> 17;
  dice ^= dice << 5;
  return dice & 1;
};
const pads = mcu.peripherals[0x40018], registers = new Uint32Array(16);
pads.readUint32 = (offset) => offset < 0x40 ? registers[offset >> 2] : 0;
pads.writeUint32 = (offset, value) => {
  if (offset < 0x40) registers[offset >> 2] = value;
  if (offset === 0x0c) {
    override = (value >> 8) & 3;
    const now = override === 2;
    if (now && !selected) { sent = []; received = []; } else if (selected && !now) apply();
    selected = now;
  }
};

const cdc = new USBCDC(mcu.usbCtrl);
let wanted = null;
const waiting = [];
const endpointRead = mcu.usbCtrl.onEndpointRead;
function pump() {
  if (wanted === null || !waiting.length) return;
  const size = Math.min(wanted, waiting.length, 64);
  wanted = null;
  mcu.usbCtrl.endpointReadDone(cdc.outEndpoint, Uint8Array.from(waiting.splice(0, size)));
}
mcu.usbCtrl.onEndpointRead = (endpoint, size) => {
  if (endpoint === cdc.outEndpoint) { wanted = size; pump(); } else if (endpointRead) endpointRead(endpoint, size);
};
const early = [];
let connected = false;
cdc.onDeviceConnected = () => { connected = true; waiting.push(...early.splice(0)); };
cdc.onSerialData = (data) => process.stdout.write(Buffer.from(data));
process.stdin.on('data', (data) => { (connected ? waiting : early).push(...data); });
process.stdin.on('end', () => process.exit(0));
mcu.peripherals[0x40058].onWatchdogTrigger = () => {
  const [image, at, size] = option('kept').split(/[@+]/);
  if (image) fs.writeFileSync(image, mcu.flash.subarray(+at, +at + +size));
  process.exit(9);
};

// rp2040js asks for the transmit interrupt all the time, and never for that of an idle receiver.
const uart = mcu.uart[0], uartWrite = uart.writeUint32.bind(uart);
uart.checkInterrupts = () => mcu.setInterrupt(uart.irq, !!(uart.interruptStatus & uart.interruptMask));
uart.writeUint32 = (offset, value) => {
  uartWrite(offset, value);
  if (offset === 0) { uart.interruptStatus |= 0x20; uart.checkInterrupts(); }
};
function receive(byte) {
  uart.rxFIFO.push(byte);
  uart.interruptStatus |= 0x50;
  uart.checkInterrupts();
}
let uartByte = () => {}, untilByte = () => Infinity;
if (option('uart')) {
  const wire = new net.Socket({ fd: +option('uart'), readable: true, writable: true });
  let arriving = [], taken = 0, next = 0, sending = [];
  wire.on('data', (data) => { arriving = arriving.slice(taken).concat(...data); taken = 0; });
  uart.onByte = (byte) => sending.push(byte);
  untilByte = () => taken === arriving.length ? Infinity : Math.max(next - sim.clock.nanos, nanos);
  uartByte = () => {
    if (sending.length) { wire.write(Buffer.from(sending)); sending = []; }
    if (taken === arriving.length || sim.clock.nanos < next || uart.rxFIFO.full) return;
    next = sim.clock.nanos + 1e10 / 115200;
    receive(arriving[taken++]);
  };
}

if (!process.argv.includes('--plain')) await faster(mcu);
mcu.core.PC = 0x10000000;
const nanos = 1e9 / 125e6, paced = process.argv.includes('--paced'), PIECE = 2e6, CREDIT_MS = 5;
let ahead = 0, then = performance.now();
const clock = sim.clock, core = mcu.core;
const least = +option('digest');
let done = 0;
function digest() {
  const hash = crypto.createHash('sha256');
  const { registers, cycles, N, Z, C, V, IPSR, pendingInterrupts } = core;
  hash.update(registers).update(mcu.sram).update(mcu.flash).update(mcu.usbDPRAM);
  hash.update(JSON.stringify([cycles, N, Z, C, V, IPSR, pendingInterrupts, clock.nanos]));
  fs.writeSync(2, `${hash.digest('hex')} ${core.cycles} cycles\n`);
  process.exit(0);
}
function loop() {
  const start = clock.nanos;
  for (let k = 0; k < 500 && !(paced && clock.nanos - start > PIECE); k++) {
    pump();
    uartByte();
    for (let i = 0; i < 500; i++) {
      if (core.waiting) {
        const idle = Math.min(clock.nanosToNextAlarm, untilByte());
        clock.tick(idle);
        i += idle / nanos;
        continue;
      }
      const taken = core.executeInstruction() * nanos, now = clock.nanosCounter + taken;
      if (clock.nextAlarm && clock.nextAlarm.nanos <= now) clock.tick(taken);
      else clock.nanosCounter = now;
      done++;
    }
  }
  if (least && done >= least) digest();
  if (paced) {
    const now = performance.now();
    ahead = Math.max(ahead + (clock.nanos - start) / 1e6 - (now - then), -CREDIT_MS);
    then = now;
  }
  if (ahead > 1) setTimeout(loop, ahead); else setImmediate(loop);
}
loop();
