// rp2040js, faster and otherwise the same: its own text of executeInstruction(), a chain of 80 comparisons, made into a
// table of 65,536 opcodes and a switch; RAM and flash read and written without a look at the peripherals; the clock
// called only where an alarm is due. Instructions, cycles, registers and memory stay what they were (a test holds it against the package's own).
import fs from 'fs';
import { fileURLToPath } from 'url';

const RAM = 0x20000000, FLASH = 0x10000000, WIDE = 0xe800;

function dispatching(text) {
  const lines = text.split('\n');
  const begin = lines.findIndex((line) => line === '    executeInstruction() {');
  const first = lines.findIndex((line, i) => i > begin && /^ {8}if \(opcode /.test(line));
  const last = lines.findIndex((line, i) => i > first && line === '        else {');
  if (begin < 0 || first < 0 || last < 0) throw new Error('rp2040js: executeInstruction() is not as it was');
  const conditions = [], bodies = [];
  for (let i = first; i < last; i++) {
    const found = /^ {8}(?:else )?if \((.*)\) \{$/.exec(lines[i]);
    if (found) { conditions.push(found[1]); bodies.push([]); }
    else if (/^ {8}(\}|\/\/.*)$/.test(lines[i])) continue;
    else if (/^ {12}/.test(lines[i])) bodies[bodies.length - 1].push(lines[i]);
    else throw new Error(`rp2040js: not understood: ${lines[i]}`);
  }
  const test = new Function('opcode', `${conditions.map((c, i) => c.includes('opcode2') ? '' : `if (${c}) return ${i + 1};`).join('\n')}\nreturn 0;`);
  const table = new Uint8Array(65536);
  for (let opcode = 0; opcode < WIDE; opcode++) table[opcode] = test(opcode);
  const call = conditions.findIndex((c) => c.startsWith('opcode >> 11 === 0b11110 && opcode2'));
  table.fill(call + 1, 0xf000, 0xf800);
  const cases = bodies.map((body, i) => conditions[i].includes('opcode2') && i !== call ? '' : `case ${i + 1}: {\n${body.join('\n')}\nbreak; }`);
  const method = `
    executeInstruction() {
        if (this.interruptsUpdated) {
            if (this.checkForInterrupts()) {
                this.waiting = false;
            }
        }
        const opcodePC = this.registers[15] & ~1;
        const opcode = this.readUint16(opcodePC);
        const kind = TABLE[opcode];
        const opcode2 = kind === ${call + 1} ? this.readUint16(opcodePC + 2) : 0;
        if (kind === 0 || kind === ${call + 1} && !(${conditions[call]})) return this.executeOther();
        this.registers[15] += 2;
        let deltaCycles = 1;
        switch (kind) {
${cases.join('\n')}
        }
        this.cycles += deltaCycles;
        return deltaCycles;
    }`;
  lines[begin] = '    executeOther() {';
  return [[...lines.slice(0, begin), method, ...lines.slice(begin)].join('\n'), table];
}

export async function faster(mcu) {
  const where = new URL('cortex-m0-core.js', new URL(import.meta.resolve('rp2040js')));
  const [text, table] = dispatching(fs.readFileSync(fileURLToPath(where), 'utf8'));
  const { MAX_HARDWARE_IRQ } = await import(new URL('irq.js', where));
  const { APB_START_ADDRESS, SIO_START_ADDRESS } = await import(new URL('rp2040.js', where));
  const plain = text.replace(/^import .*$/gm, '').replace(/^export /gm, '');
  const made = new Function('MAX_HARDWARE_IRQ', 'APB_START_ADDRESS', 'SIO_START_ADDRESS', 'TABLE', `${plain}\nreturn CortexM0Core;`);
  const Core = made(MAX_HARDWARE_IRQ, APB_START_ADDRESS, SIO_START_ADDRESS, table);
  const core = mcu.core;
  Object.setPrototypeOf(core, Core.prototype);
  const { sram, sramView, flash, flash16, flashView } = mcu;
  const ramEnd = sram.length, flashEnd = flash.length;
  core.readUint16 = (address) => {
    const inFlash = address - FLASH;
    if (inFlash >= 0 && inFlash < flashEnd && !(address & 1)) return flash16[inFlash >> 1];
    const inRam = address - RAM;
    if (inRam >= 0 && inRam + 1 < ramEnd) return sramView.getUint16(inRam, true);
    return mcu.readUint16(address);
  };
  core.readUint32 = (address) => {
    if ((address & 3) === 0) {
      const at = address >>> 0, inRam = at - RAM;
      if (inRam >= 0 && inRam + 3 < ramEnd) return sramView.getUint32(inRam, true);
      const inFlash = at - FLASH;
      if (inFlash >= 0 && inFlash + 3 < flashEnd) return flashView.getUint32(inFlash, true);
    }
    return mcu.readUint32(address);
  };
  core.writeUint32 = (address, value) => {
    const inRam = (address >>> 0) - RAM;
    if (inRam >= 0 && inRam + 3 < ramEnd) sramView.setUint32(inRam, value, true);
    else mcu.writeUint32(address, value);
  };
  core.writeUint16 = (address, value) => {
    const inRam = address - RAM;
    if (inRam >= 0 && inRam + 1 < ramEnd) sramView.setUint16(inRam, value, true);
    else mcu.writeUint16(address, value);
  };
  core.readUint8 = (address) => {
    const inRam = address - RAM;
    if (inRam >= 0 && inRam < ramEnd) return sram[inRam];
    return mcu.readUint8(address);
  };
  core.writeUint8 = (address, value) => {
    const inRam = address - RAM;
    if (inRam >= 0 && inRam < ramEnd) sram[inRam] = value;
    else mcu.writeUint8(address, value);
  };
}
