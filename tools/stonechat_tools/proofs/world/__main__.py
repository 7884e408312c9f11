from stonechat_tools.proofs.world.run import main

if __name__ == "__main__":
    raise SystemExit(main())
