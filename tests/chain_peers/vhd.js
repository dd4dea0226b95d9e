// What Xen Orchestra's vhd-lib does with differencing VHDs:
//   vhd.js chain PARENT CHILD        makes the empty disk CHILD a child of PARENT
//   vhd.js write IMAGE SECTOR FILE   writes the contents of FILE from SECTOR on
//   vhd.js flat IMAGE TARGET         makes one dynamic disk of all that a chain holds
const fs = require('fs')
const { pipeline } = require('stream/promises')
const { default: Vhd, chainVhd, createSyntheticStream } = require('vhd-lib')

// Files as the library wants them.
const files = {
  openFile: async (path, flags) => ({ fd: fs.openSync(path, flags), path }),
  closeFile: async ({ fd }) => fs.closeSync(fd),
  getSize: async file => fs.statSync(file.path || file).size,
  read: async (file, buffer, position) => files.use(file, 'r', fd => {
    const bytesRead = fs.readSync(fd, buffer, 0, buffer.length, position)
    return { bytesRead, buffer }
  }),
  write: async (file, buffer, position) => files.use(file, 'r+', fd => {
    fs.writeSync(fd, buffer, 0, buffer.length, position)
  }),
  use: (file, flags, act) => {
    if (file.fd !== undefined) return act(file.fd)
    const fd = fs.openSync(file, flags)
    try { return act(fd) } finally { fs.closeSync(fd) }
  },
}

const commands = {
  chain: (parent, child) => chainVhd(files, parent, files, child, true),
  write: async (image, sector, file) => {
    const vhd = new Vhd(files, image)
    await vhd.readHeaderAndFooter()
    await vhd.readBlockAllocationTable()
    await vhd.writeData(Number(sector), fs.readFileSync(file))
    await vhd.writeFooter()
  },
  flat: async (image, target) => {
    await pipeline(await createSyntheticStream(files, image), fs.createWriteStream(target))
  },
}

const [command, ...parameters] = process.argv.slice(2)
commands[command](...parameters).catch(error => {
  console.error(error)
  process.exit(1)
})
